"""What a run starts from: nothing, its own last checkpoint, or the weights of another model; and its folder.

config, start = resolve(globals(), __file__)
"""

import os
import socket
from dataclasses import asdict, dataclass, field
from pathlib import Path
from shlex import quote
from typing import IO, Any

from torch import nn

from minutegpt import checkpoint
from minutegpt.checkpoint import Progress
from minutegpt.config import (
    Settings,
    check_bounds,
    model_defaults,
    modern_names,
    out_of_bounds,
    read_settings,
    resume_config,
)
from minutegpt.data.dataset import parse_mixture
from minutegpt.data.pipeline import ensure_dataset
from minutegpt.device import Machine
from minutegpt.distributed import sync_object, worst_of_all_ranks
from minutegpt.errors import UserError
from minutegpt.files import run_lock
from minutegpt.huggingface import SIZES, load_any
from minutegpt.log import OURS, check_installed, more_training
from minutegpt.optim import lr_scale
from minutegpt.quantize import packed_format
from model import GPT, GPTConfig

OF_THIS_CALL = ("out_dir", "init_from", "overwrite")  # settings that a resumed run does not take over


@dataclass
class Start:
    """state: the checkpoint to resume, or None. model, tokenizer: weights to start from, and their tokenizer.

    settings: what the call asked for. notes: what a resumed run changes.
    """

    settings: Settings
    state: dict[str, Any] | None = None
    model: GPT | None = None
    tokenizer: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def resuming(self) -> bool:
        return self.state is not None

    @property
    def environment(self) -> dict[str, Any]:
        return (self.state or {}).get("environment", {})

    def section_note(self, device: str) -> str:
        """One line on the config file's section for this device: which was used, why, and how to get the other."""
        if not self.settings.sections or self.resuming:
            return ""
        others = ", ".join(sorted(self.settings.sections - {self.settings.section}))
        if not self.settings.section:
            return f"no section is used on {device}; it has one for {others}: --section=NAME"
        return f"its section for {self.settings.section} is used, as the run is on {device}; without it: --section=none"


def resolve(defaults: dict[str, Any], script: str) -> tuple[dict[str, Any], Start]:
    """Every setting of the run, and what it starts from.

    Precedence: command line, then checkpoint (when resuming), then config file, then defaults.
    Raises UserError for mistakes, for no checkpoint to resume, and for a change of a resumed model.
    """
    settings = read_settings(defaults, script, model=GPTConfig, lists=("compare",))
    config: dict[str, Any] = dict(settings.values)
    start = Start(settings)
    out_dir = config["out_dir"]
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) and checkpoint.has_checkpoint(out_dir):
        start.state = checkpoint.load_run(out_dir, "latest")  # torchrun restarted its processes
        if is_of_this_launch(start.state.get("launch", "")):
            config["init_from"] = "resume"
        else:  # the run of another call, which this one was not to replace, or has not replaced yet
            start.state = None
    if config["init_from"] == "resume":
        start.state = start.state or checkpoint.load_run(out_dir, "latest")
        if packed_format(start.state["model"]):
            raise UserError(
                f"{out_dir} holds a model rounded for use, not a run. Resume the run it came from, or train on from "
                f"the model alone: --init_from={out_dir} --out_dir=NAME"
            )
        fixed = [*model_defaults(GPTConfig), "optimizer"]
        resumed, start.notes = resume_config(settings, start.state, fixed, OF_THIS_CALL)
        config = {**resumed, "init_from": "resume"}
    elif config["init_from"] != "scratch":
        start.model, start.tokenizer, config = load_weights(config["init_from"], config, settings.given)
    if "max_iters" in settings.given and "max_minutes" not in settings.given and config["max_minutes"]:
        start.notes.append(f"max_minutes {config['max_minutes']:g} -> 0, because of --max_iters")
        config["max_minutes"] = 0.0
    check_bounds(config)
    if start.resuming and "learning_rate" not in settings.given and (note := rate_note(start, config)):
        start.notes.append(note)
    return config, start


def launch() -> str:
    """What started this process: torchrun's id, the machine, and torchrun's process there; "" without torchrun."""
    run = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return f"{run} {socket.gethostname()} {os.getppid()}" if run else ""


def is_of_this_launch(saved: str) -> bool:
    """Whether `saved` is the launch() of a process that torchrun started in this call too, maybe on another machine."""
    if not (own := launch()):
        return False
    run, machine, _ = own.rsplit(" ", 2)
    return saved == own or (saved.startswith(f"{run} ") and f" {machine} " not in saved)


def rate_note(start: Start, config: dict[str, Any]) -> str:
    """What to say where a resumed run has a much higher learning rate than before, as with more max_iters; else ""."""
    state = start.state or {}
    step, seconds = max(0, state["step"] - 1), state.get("seconds", 0.0)  # the last step that was trained
    saved = modern_names(state["config"])
    before = config | {key: value for key, value in saved.items() if type(value) is type(config.get(key))}
    if out_of_bounds(before) or not state["step"]:
        return ""
    old, new = (scheduled_rate(values, step, seconds) for values in (before, config))
    if new <= 1.5 * old:
        return ""
    peak = config["learning_rate"] * max(0.1, old / new)
    return (
        f"learning rate {old:.2g} -> {new:.2g} at step {step + 1}, because its schedule now ends later. The loss may "
        f"rise at first. For a lower rate: --learning_rate={peak:.1g}"
    )


def scheduled_rate(config: dict[str, Any], step: int, seconds: float) -> float:
    """The learning rate of a step, or after so many seconds of a run of max_minutes."""
    warmup = min(config["warmup_iters"], config["max_iters"] // 2)
    done, decay = min(1.0, (step + 1) / (warmup + 1)), max(0, step - warmup) / max(1, config["max_iters"] - warmup)
    if config["max_minutes"]:
        done, decay = 1.0, seconds / (60 * config["max_minutes"])
    peak = config["learning_rate"]
    return (
        peak
        * done
        * lr_scale(config["lr_schedule"], decay, config["min_lr"] / max(peak, 1e-30), config["decay_fraction"])
    )


def expected_minutes(config: dict[str, Any]) -> float:
    """How long the run takes: max_minutes, or what its steps would take a laptop at 50 GFLOP/s.

    Before anything is measured, and an upper bound on a GPU. It only decides whether compilation is worth its time.
    """
    if config["max_minutes"]:
        return config["max_minutes"]
    tokens = config["max_iters"] * config["batch_size"] * config["gradient_accumulation_steps"] * config["block_size"]
    flops = 6 * 12 * config["n_layer"] * config["n_embd"] ** 2 * tokens
    return flops / 50e9 / 60


def finished(config: dict[str, Any], start: Start) -> str:
    """What to say of a resumed run that has nothing left to do; "" where it has."""
    state = start.state or {}
    step, seconds, minutes = state.get("step", 0), state.get("seconds", 0.0), config["max_minutes"]
    evaluated = state.get("evaluated", -1) == step
    out_of_time = minutes > 0 and (seconds >= 60 * minutes or state.get("finished_minutes", 0.0) >= minutes)
    out_of_steps = start.resuming and not minutes and step >= config["max_iters"] and evaluated
    if not (out_of_time or out_of_steps):
        return ""
    not_taken = "".join(f"\n{note}" for note in start.notes if note.startswith("not taken"))
    return (
        f"the run in {config['out_dir']} is finished: {step} steps, best validation loss "
        f"{state['best_val_loss']:.4f}. To train on: python train.py --init_from=resume "
        f"--out_dir={quote(config['out_dir'])} {more_training(step, seconds, minutes)}{not_taken}"
    )


def claim(config: dict[str, Any], machine: Machine, start: Start) -> IO[str] | None:
    """Makes the run's folder and locks it: until this process ends, no other run may write there. Rank 0 alone.

    Raises UserError where a run is there that this one would replace, or another process has the lock.
    """
    if machine.rank != 0:
        return None
    check_installed(config["tracker"])
    out_dir = config["out_dir"]
    if not start.resuming and not config["overwrite"] and checkpoint.has_checkpoint(out_dir):
        raise UserError(
            f"{out_dir} already contains a run. Resume it: python train.py --init_from=resume "
            f"--out_dir={quote(out_dir)}; replace it: --overwrite; write elsewhere: --out_dir=NAME"
        )
    if strangers := foreign_files(Path(out_dir)):
        raise UserError(
            f"{out_dir} contains {', '.join(strangers)}, which no run wrote. Write elsewhere: "
            "--out_dir=NAME; or move these files away"
        )
    return run_lock(out_dir)


def foreign_files(out_dir: Path) -> list[str]:
    """Names in a folder that a run would replace and that are not a run's: it has no checkpoint and no such config."""
    lock = _start_of(out_dir / ".lock")
    strangers = [".lock"] * (lock.strip() != b"" and not lock.startswith(b"process "))
    config = _start_of(out_dir / "config.json")
    if checkpoint.has_checkpoint(out_dir) or (b'"out_dir": ' in config and b'"init_from": ' in config):
        return strangers
    return strangers + [name for name in OURS if os.path.exists(out_dir / name)]


def _start_of(path: Path) -> bytes:
    """The first bytes of a file; b"" where there is none."""
    try:
        with open(path, "rb") as file:
            return file.read(4096)
    except OSError:
        return b""


def check_same_checkpoint(out_dir: str, start: Start) -> None:
    """Raises UserError, on all ranks, where machines resume from different steps: they would wait for each other."""
    step = float((start.state or {}).get("step", -1))
    if sum(worst_of_all_ranks([step, -step])):  # the largest and the smallest step
        raise UserError(
            f"not all machines have the same checkpoint in {out_dir}. Copy it to each, or type an --out_dir that they "
            "share"
        )


def find_dataset(config: dict[str, Any], machine: Machine, start: Start) -> str:
    """The dataset to train on, prepared by rank 0 if needed.

    A call without a config file and without --dataset falls back to python_code where the text cannot be had.
    """
    asked = "dataset" in start.settings.given or start.settings.from_file or start.resuming
    name = config["dataset"]
    if machine.rank == 0:
        name = ensure_dataset(name, fallback="" if asked else "python_code")
    return sync_object(name)


def choose(config: dict[str, Any], machine: Machine, start: Start) -> dict[str, Any]:
    """The config with the dataset that is there, and with what the planner chooses where config/auto.py asks for it.

    The plan becomes plain settings, and `plan` turns False: a resumed run does not plan again. The forecast is
    config["forecast"], loss and margin.
    """
    config["dataset"] = find_dataset(config, machine, start)
    changed = [note for note in start.notes if not note.startswith("not taken")]
    if start.state and "forecast" in start.state["config"] and not changed:  # of the run as it was planned
        config["forecast"] = start.state["config"]["forecast"]
    if not config["plan"] or start.resuming:
        return config
    if start.model:
        raise UserError(
            f"--init_from={config['init_from']} brings a model along, and the planner chooses a new one. Leave "
            "config/auto.py or --init_from out"
        )
    from minutegpt.planner import plan_run

    chosen: dict[str, Any] = {}
    if machine.rank == 0:
        chosen = plan_run(config, start.settings, machine)
    config.update(sync_object(chosen), plan=False)
    check_bounds(config)
    return config


def shares(dataset: str) -> list[float]:
    """Of each part of a mixture, in their order."""
    return [*parse_mixture(dataset).values()]


def compare_data(start: Start, config: dict[str, Any], fingerprint: str) -> None:
    """Notes where a resumed run trains on other data than before; its best loss then starts again.

    So it does where the same data are mixed in other shares, or where weights are rounded otherwise (qat).
    fingerprint: of the training split. Checkpoints of earlier versions have none: there the dataset's name decides.
    """
    if start.state is None:
        return
    before, saved = start.state.get("data_fingerprint", ""), start.state["config"]
    dataset = saved.get("dataset") or config["dataset"]
    same_text = before == fingerprint if before else dataset == config["dataset"]
    same = same_text and saved.get("qat", "") == config.get("qat", "")
    if same and (dataset == config["dataset"] or shares(dataset) == shares(config["dataset"])):
        return
    if dataset == config["dataset"] and not same_text:
        start.notes.append(f"the text of {dataset} is another one than before")
    start.state |= {"best_val_loss": Progress().best_val_loss, "best_step": 0, "evaluated": -1}


def build_model(start: Start, config: dict[str, Any], tokenizer: dict[str, Any]) -> GPT:
    """The model of the run, on the CPU. tokenizer: the dataset's, as JSON.

    Raises UserError where the dataset's ids are not the model's, or memory does not suffice.
    """
    dataset, out_dir = config["dataset"], config["out_dir"]
    if start.state:
        if start.state["tokenizer"] not in (None, tokenizer):
            raise UserError(
                f"{dataset} was prepared with another tokenizer than the checkpoint in {out_dir}: its ids mean other "
                "things. Prepare it again as it was, or train from scratch in another --out_dir"
            )
        model = checkpoint.build_model(start.state)
        del start.state["model"]  # 4 bytes per parameter, in each process
        if model.config.vocab_size < tokenizer["vocab_size"]:
            raise UserError(
                f"{dataset} has {tokenizer['vocab_size']} tokens, the checkpoint in {out_dir} "
                f"{model.config.vocab_size}: it was trained on other data. Type --dataset=NAME, the dataset of that run"
            )
        return model
    if start.model:
        check_vocabulary(start.model, start.tokenizer, tokenizer, dataset)
        return start.model
    try:
        settings = {name: config[name] for name in model_defaults(GPTConfig)}
        return GPT(GPTConfig(vocab_size=tokenizer["vocab_size"], **settings))
    except ValueError as error:
        raise UserError(str(error)) from None
    except (RuntimeError, MemoryError):
        n_layer, n_embd = config["n_layer"], config["n_embd"]
        raise UserError(f"{n_layer=} of {n_embd=} take more memory than there is. Make them smaller") from None


def load_teachers(config: dict[str, Any], model: GPT, tokenizer: dict[str, Any], device: Any) -> list[GPT]:
    """The models of --teachers, a list of sources with commas, in eval mode on the device."""
    sources = [source.strip() for source in config["teachers"].split(",") if source.strip()]
    return [load_teacher(source, model.config, tokenizer, config["dataset"]).to(device) for source in sources]


def load_weights(
    source: str, config: dict[str, Any], given: set[str]
) -> tuple[GPT, dict[str, Any] | None, dict[str, Any]]:
    """For train.py's init_from: the model, its tokenizer as JSON (None if unknown), the config with its settings.

    source: as load_any takes it. given: the settings on the command line. Of the config, a smaller block_size cuts the
    context, and dropout is taken. Raises UserError for a setting that contradicts the weights.
    """
    if source not in SIZES and not os.path.isdir(source):
        raise UserError(f"--init_from={source} is none of scratch, resume, {', '.join(SIZES)}, nor a folder")
    state = load_any(source)
    model = checkpoint.build_model(state)
    had = asdict(model.config)
    fixed = given & (had.keys() - {"block_size", "dropout"})
    wanted = {setting: config[setting] for setting in sorted(fixed)}
    if wanted.get("n_kv_head") == 0:
        wanted["n_kv_head"] = had["n_head"]
    T, longest = config["block_size"], had["block_size"]
    if had["pos"] == "learned":  # it knows these positions and no others
        wanted |= {"block_size": T} if "block_size" in given and longest < T else {}
        T = min(T, longest)
        model.transformer.wpe.weight = nn.Parameter(model.transformer.wpe.weight.detach()[:T].clone())
    if wrong := [
        f"{setting}={had[setting]} (not {value})" for setting, value in wanted.items() if value != had[setting]
    ]:
        raise UserError(f"the model in {source} has {', '.join(wrong)}. Leave that out, or train from scratch")
    try:
        model.config = GPTConfig(**had | {"block_size": T, "dropout": config["dropout"]})
    except ValueError as error:
        raise UserError(str(error)) from None
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = config["dropout"]
    return model, state["tokenizer"], config | {k: v for k, v in asdict(model.config).items() if k in config}


def check_vocabulary(model: GPT, tokenizer: dict[str, Any] | None, ours: dict[str, Any], dataset: str) -> None:
    """Raises UserError where the ids of the dataset, whose tokenizer is `ours`, mean other things to the model.

    tokenizer: the model's; where it has none, sizes are compared, which may be padded to a multiple of 128.
    """
    size = model.config.vocab_size
    if tokenizer != ours if tokenizer else not 0 <= size - ours["vocab_size"] < 128:
        what = f"{tokenizer['kind']}, " if tokenizer else ""
        raise UserError(
            f"{dataset} was prepared with another tokenizer ({ours['kind']}, {ours['vocab_size']} ids) than the model "
            f"to start from ({what}{size} ids), so its ids mean other things. Prepare it with the same one, or train "
            "from scratch"
        )


def load_teacher(source: str, student: GPTConfig, ours: dict[str, Any], dataset: str) -> GPT:
    """A teacher for distillation: the model at a source that `load` takes, in eval mode, its weights fixed.

    ours: the dataset's tokenizer. Raises UserError where the teacher knows other ids, or fewer positions.
    """
    if source not in SIZES and not os.path.isdir(source):
        raise UserError(f"--teachers={source}: this is neither a folder nor one of {', '.join(SIZES)}")
    state = load_any(source)
    model = checkpoint.build_model(state).eval().requires_grad_(False)
    if (state["tokenizer"] or ours) != ours or model.config.vocab_size != student.vocab_size:
        raise UserError(
            f"--teachers={source}: this teacher's {model.config.vocab_size} ids are not the {student.vocab_size} of "
            f"{dataset}. Take one that was trained with the same tokenizer, or prepare the data with the teacher's"
        )
    T = model.config.block_size
    if model.config.pos == "learned" and student.block_size > T:
        raise UserError(f"--teachers={source}: this teacher reads {T} tokens at most. Type --block_size={T}")
    return model
