"""Trains a GPT:  python train.py [config/FILE.py] [--key=value ...]

Read from top to bottom: the knobs, the set-up, what a step is made of, the preflight, the loop. On several GPUs or
machines: torchrun --standalone --nproc_per_node=N train.py ...
"""

import minutegpt.errors  # noqa: F401, I001  first: it finds the environment that has torch

import copy
import json
import math
import os
import shutil
import signal
import statistics
import sys
import time
import warnings
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize
from tqdm import tqdm

from minutegpt import checkpoint, fsdp, log, plot, setup
from minutegpt.config import read_settings, require, resume_config
from minutegpt.distributed import sync, split_batch, exit_all
from minutegpt.device import environment, fast_dropout, peak_flops, peak_memory, init_machine, synchronize
from minutegpt.moe import update_router_bias
from minutegpt.files import atomic_write, run_lock
from minutegpt.optim import make_optimizers, schedule, set_lr
from minutegpt.data.pipeline import ensure_dataset
from minutegpt.quantize import FORMATS, fake_quantize, packed_format, plain_names
from minutegpt.log import si_number, format_seconds, print_line
from minutegpt.data.dataset import eval_starts, open_data
from minutegpt.errors import STARTED, UserError
from minutegpt.data.tokenizer import from_json
from minutegpt.log import MODULES, Tracker, check_installed
from model import GPT, GPTConfig

# ----------------------------------------------------------------------------------------------------------------
# every knob, with its default: the classic GPT on Tiny Shakespeare. a config file or --key=value overrides it
# the run
out_dir = "out"  # everything the run writes: checkpoints, log.jsonl, loss.png, config.json
# "scratch"; "resume": go on with the run in out_dir, whose config comes along; or weights to start from, with their
# model's knobs: a run's folder, "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", or a folder that has one of these
init_from = "scratch"
overwrite = False  # a new run may take the place of the one in out_dir
seed = 1337  # weights, order of the data, dropout, samples
eval_interval = 250  # steps from one evaluation and checkpoint to the next
eval_iters = 200  # batches an evaluation reads at most, of each split; the windows are the same every time
eval_only = False  # evaluate once, and end
log_interval = 10  # steps from one line and log entry to the next
tracker = "none"  # tensorboard, wandb, trackio: gets each row of log.jsonl too (uv sync --extra NAME installs it)
max_iters = 5000  # steps in all
max_minutes = 0.0  # wall clock for all of it, start-up and last save included; 0 is off, else max_iters is
# data
dataset = "shakespeare_char"  # a folder of data/, prepared if need be by prepare/<dataset>.py; "a:0.7,b:0.3" mixes
batch_size = 64  # rows a forward pass
gradient_accumulation_steps = 1  # forward passes a step. the global batch is the product, on any number of machines
block_size = 256  # tokens of context
# model
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.0  # on the residual paths; 0.2 where the data is small
bias = False  # in linears and layernorms
pos = "learned"  # learned, rope
norm = "layernorm"  # layernorm, rmsnorm
norm_position = "pre"  # pre, post (the original transformer)
activation = "gelu"  # gelu, gelu_tanh (GPT-2), relu, relu2
qk_norm = False  # normalised queries and keys
tie = True  # the output head is the token embedding
softcap = 0.0  # bound on the logits; 0 is off
n_kv_head = 0  # key-value heads; 0 is n_head
zero_init = False  # output projections start at zero
ngram = 0  # embeddings of the last 2 .. ngram tokens beside each token's own; 0 is off
ngram_rows = 32768  # of each of their tables
n_expert = 0  # mixture of experts in the place of the MLP; 0 is one MLP for all
n_expert_active = 2  # experts that each token visits, 2 at least
# optimizer
optimizer = "adamw"  # adamw; muon: Muon on the hidden matrices, AdamW on the rest
learning_rate = 1e-3  # AdamW's, at its peak
weight_decay = 1e-1  # on matrices only
ngram_weight_decay = 5.0  # on the n-grams' tables: what they learned by heart from the text must fade (optim.py)
qat = ""  # int8, int4, int4-tensor: trains weights that bear this rounding (sample.py --quantize)
distill = ""  # teachers, with commas: runs' folders or GPT-2s, whose mean prediction is half of what is learned
beta1 = 0.9
beta2 = 0.99
muon_lr = 0.02  # Muon's, at its peak
muon_weight_decay = 0.0
grad_clip = 1.0  # largest norm of the gradient; 0 is off
decay_lr = True  # off: constant behind the warmup
lr_schedule = "cosine"  # cosine; linear: constant, then straight down over the last decay_fraction
decay_fraction = 1.0
warmup_iters = 100  # linear from zero; at most half the run
lr_decay_iters = 0  # the step at which the decay ends; 0 is max_iters
min_lr = 0.0  # where the decay ends
# machine
device = "auto"  # auto, cpu, cuda, cuda:1, mps
dtype = "auto"  # auto, float32, bfloat16, float16 (CUDA, with a gradient scaler)
compile = "auto"  # auto, true, false: torch.compile
backend = "auto"  # auto, nccl, gloo: what torchrun's processes talk through
shard = False  # FSDP2: torchrun's processes divide weights, gradients and optimizer state (docs/scaling.md)
deterministic = False  # CUDA: the same bits every time, where PyTorch can, at some cost of speed
# ----------------------------------------------------------------------------------------------------------------
settings = read_settings(globals(), __file__)
config, given = settings.values, settings.given
globals().update(config)
MODEL_KNOBS = [f.name for f in fields(GPTConfig) if f.name != "vocab_size"]
OF_THIS_CALL = ("out_dir", "init_from", "overwrite", "eval_only")  # what a resumed run does not take over
state = None
if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) and (Path(out_dir) / "ckpt.pt").exists():
    init_from = "resume"  # torchrun started its processes again
if init_from == "resume":  # the run's own config goes on, with what the command line changes
    state = checkpoint.load_run(out_dir, "latest")
    if packed_format(state["model"]):
        raise UserError(
            f"{out_dir} holds a model rounded for use, not a run: resume the run it came from, or train on from the "
            f"model alone: --init_from={out_dir} --out_dir=NAME"
        )
    config, changes = resume_config(settings, state, [*MODEL_KNOBS, "optimizer"], OF_THIS_CALL)
    globals().update(config)
initial = theirs = None  # the model to start from, and its tokenizer
if init_from not in ("scratch", "resume"):
    initial, theirs, config = setup.start_from(init_from, config, given)
    globals().update(config)
require(
    config,
    at_least={
        "batch_size": 1, "gradient_accumulation_steps": 1, "eval_interval": 1, "eval_iters": 1, "log_interval": 1,
        "max_iters": 0, "max_minutes": 0, "learning_rate": 0, "min_lr": 0, "grad_clip": 0, "warmup_iters": 0, "seed": 0,
        "lr_decay_iters": 0, "decay_fraction": 1e-6, "muon_lr": 0, "weight_decay": 0, "muon_weight_decay": 0,
        "ngram_weight_decay": 0, "beta1": 0, "beta2": 0, "softcap": 0,
    },
    at_most={  # far above any use, far below what hangs a machine: a config may come with a stranger's checkpoint
        "beta1": 0.99999, "beta2": 0.99999, "decay_fraction": 1, "max_minutes": 1e6, "n_layer": 1000, "n_embd": 2**16,
        "block_size": 2**20, "batch_size": max(1, 2**22 // max(1, block_size)),
    },
    one_of={
        "optimizer": ("adamw", "muon"), "lr_schedule": ("cosine", "linear"), "qat": ("", *FORMATS),
        "tracker": tuple(MODULES),
    },
)  # fmt: skip

# -- the machine

was = state.get("environment", {}) if state else {}
same_kind = bool(was) and device.split(":")[0] in ("auto", was.get("device"))  # then auto means: as it was
machine = init_machine(
    device,
    was["dtype"] if same_kind and dtype == "auto" else dtype,
    was["compile"] if same_kind and compile == "auto" else compile,
    backend,
    max_minutes,
)
master = machine.rank == 0  # prints and writes, for all the processes
if shard and n_expert:
    raise UserError(
        f"--shard does not divide a mixture of experts (--n_expert={n_expert}) yet. Leave --shard out: each process "
        "then has the whole model; or train the dense one, --n_expert=0"
    )
if shard and machine.world_size == 1 and "shard" in given:
    raise UserError(
        "--shard divides the run among processes, and there is one. Type torchrun --standalone --nproc_per_node=N "
        "train.py ..., N the number of GPUs, or leave --shard out"
    )
shard = shard and machine.world_size > 1  # the checkpoint is the same: alone, a run goes on with all of it
replicate = machine.world_size > 1 and not shard  # DDP: each process has the whole model
micro_steps, micro_batch = split_batch(batch_size, gradient_accumulation_steps, machine.world_size)
global_batch = batch_size * gradient_accumulation_steps  # rows a step
tokens_per_step = global_batch * block_size
if deterministic:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)

# -- the run's folder, and the data

out = Path(out_dir)
if master and not eval_only:
    check_installed(tracker)
    if not state and not overwrite and checkpoint.has_checkpoint(out):
        raise UserError(
            f"{out_dir} holds a run already, and a new one would take its place. Go on with it: python train.py "
            f"--init_from=resume --out_dir={out_dir}; start anew in its place: --overwrite; elsewhere: --out_dir=NAME"
        )
    lock = run_lock(out)  # until this process ends, no other run may write here
if master:
    bare = "dataset" not in given and not any(word.endswith(".py") for word in sys.argv[1:])
    dataset = ensure_dataset(dataset, fallback="python_code" if bare else "")
if machine.world_size > 1:
    shared = [dataset]
    dist.broadcast_object_list(shared)  # the others wait here until the data is there
    dataset = shared[0]
config["dataset"] = dataset
train_data, val_data = (open_data(dataset, split, block_size) for split in ("train", "val"))
tokenizer = from_json(train_data.meta["tokenizer"])
if state and state["tokenizer"] not in (None, train_data.meta["tokenizer"]):
    raise UserError(
        f"{dataset} was prepared with another tokenizer than the checkpoint in {out_dir}: its ids mean other things. "
        "Prepare it again as it was, or train from scratch in another --out_dir"
    )

# -- the model and its optimizers

torch.manual_seed(seed)
if state:
    model = checkpoint.build_model(state)
    if model.config.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"{dataset} has {tokenizer.vocab_size} tokens, the checkpoint in {out_dir} {model.config.vocab_size}: it "
            "was trained on other data. Type --dataset=NAME, the dataset of that run"
        )
elif initial:
    setup.check_vocabulary(model := initial, theirs, train_data.meta["tokenizer"], dataset)
else:
    try:
        knobs: dict[str, Any] = {key: config[key] for key in MODEL_KNOBS}
        model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, **knobs))
    except ValueError as error:
        raise UserError(str(error)) from None
    except (RuntimeError, MemoryError):
        raise UserError(f"{n_layer=} of {n_embd=} take more memory than there is. Make them smaller") from None
teachers = [
    setup.teacher(place.strip(), model.config, train_data.meta["tokenizer"], dataset).to(machine.device)
    for place in distill.split(",") if place.strip()
]  # fmt: skip
if qat:
    fake_quantize(model, qat)
if shard:
    fsdp.shard(model, machine, exact=bool(qat))
model.to(machine.device)
fast_dropout(model)
optimizers = make_optimizers(
    model, optimizer, learning_rate, weight_decay, (beta1, beta2), muon_lr, muon_weight_decay,
    ngram_weight_decay, torch.bfloat16 if machine.dtype == torch.bfloat16 else torch.float32,
)  # fmt: skip
scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == torch.float16)
progress: dict[str, Any] = {  # where the run is. evaluated: the last step that was; log_rows: lines of log.jsonl
    "step": 0, "seconds": 0.0, "best_val_loss": math.inf, "best_step": 0, "evaluated": -1, "log_rows": 0,
}  # fmt: skip
if state:
    progress |= {key: state[key] for key in progress if key in state}
    checkpoint.load_optimizers(optimizers, state, fsdp.shard_optimizer_state if shard else None)
    scaler.load_state_dict(state.get("scaler") or scaler.state_dict())
step, seconds_before = progress["step"], progress["seconds"]

# evaluation and sampling use `model`, so that they cannot touch the kernels that training was compiled to
train_model = torch.compile(model) if machine.compile else model
if replicate:  # each rank counts its own experts' loads: no buffer is to be overwritten by rank 0's
    warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)  # what replaces it is newer than our floor
    train_model = DistributedDataParallel(train_model, broadcast_buffers=False)

# -- what a step is made of


def get_batch(step, micro):
    """Inputs and targets (B, T) of one forward pass: a pure function of the seed and the place in the run."""
    first = step * global_batch + (machine.rank * micro_steps + micro) * micro_batch
    starts = train_data.starts(block_size, seed, np.arange(first, first + micro_batch))  # (B,)
    tokens = train_data.windows(starts, block_size + 1)  # (B, T+1)
    if machine.device.type == "cuda":
        tokens = tokens.pin_memory()
    tokens = tokens.to(machine.device, non_blocking=True)
    return tokens[:, :-1], tokens[:, 1:]  # the target is what comes next


@torch.no_grad()
def taught(x):
    """The teachers' mean prediction at each token of x (B, T) -> (B*T, V): Hinton et al., arXiv 1503.02531."""
    with machine.autocast():
        return sum(teacher(x)[0].flatten(0, 1).softmax(1) for teacher in teachers) / len(teachers)


def forward_backward(step):
    """Leaves the gradient over the step's global batch in the parameters; gives its mean loss and gradient norm."""
    mean = torch.zeros((), device=machine.device)
    for micro in range(micro_steps):
        x, y = get_batch(step, micro)
        # dropout, too, follows from the place in the run alone: a resumed run repeats it
        torch.manual_seed(int(np.random.SeedSequence([seed, step, micro, machine.rank]).generate_state(1)[0]))
        if replicate:
            train_model.require_backward_grad_sync = micro == micro_steps - 1
        with machine.training():
            logits, loss = train_model(x, y)
        mean += loss.detach() / micro_steps
        if teachers:
            loss = (loss + F.cross_entropy(logits.flatten(0, 1), taught(x))) / 2
        scaler.scale(loss / micro_steps).backward()
    if machine.world_size > 1:
        dist.all_reduce(mean)
        mean /= machine.world_size
    for each in optimizers:
        scaler.unscale_(each)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    norm = norm.full_tensor() if shard else norm
    return torch.stack((mean, norm)).tolist()  # the one wait for the device in a step


def update(fraction):
    """A step of the optimizers, at this fraction of their peak learning rates; gives what the log tells of experts."""
    set_lr(optimizers, fraction)
    for each in optimizers:
        scaler.step(each)
        each.zero_grad(set_to_none=True)
    scaler.update()
    return update_router_bias(model, fraction)


@torch.no_grad()
def evaluate(batches=eval_iters):
    """Mean loss on train and val, over windows that are the same at every evaluation, shared among the ranks."""
    model.eval()
    n = min(batches * batch_size, (min(len(train_data), len(val_data)) - 1) // block_size)
    losses = []
    for data in (train_data, val_data):
        starts = eval_starts(len(data), block_size, n)
        total = torch.zeros((), device=machine.device)
        for i in range(0, n, machine.world_size * batch_size):  # as many passes on each rank: shards are gathered
            mine = starts[i + machine.rank * batch_size :][:batch_size]
            tokens = data.windows(mine if len(mine) else starts[:1], block_size + 1).to(machine.device)  # (B, T+1)
            with machine.autocast():
                _, loss = model(tokens[:, :-1], tokens[:, 1:])
            total += loss * len(mine)
        if machine.world_size > 1:
            dist.all_reduce(total)
        losses.append(total.item() / n)
    model.train()
    return losses


def sample_text():
    """120 characters, drawn with the same seed every time."""
    model.eval()
    torch.manual_seed(seed)
    start = tokenizer.encode("\n") if tokenizer.end_token is None else [tokenizer.end_token]
    with machine.autocast(), parametrize.cached(), fsdp.gathered_weights(model):  # under qat, weights are rounded once
        ids = model.generate(torch.tensor([start], device=machine.device), 120, temperature=0.8, top_k=200)
    model.train()
    return tokenizer.decode(ids[0, len(start) :].tolist())[:120]


def run_state():
    """All that a run needs to go on in the same bits, as tensors and plain values: on rank 0, but all must call it."""
    return progress | {
        "model": plain_names(fsdp.full_state(model.state_dict(keep_vars=True))),
        "model_config": asdict(model.config),
        "optimizer": fsdp.full_state([each.state_dict() for each in optimizers]),
        "scaler": scaler.state_dict(),
        "config": config,
        "tokenizer": train_data.meta["tokenizer"],
        "environment": environment(machine),
    }


def save(best=False):
    """Writes a checkpoint. All ranks must call it: what is sharded is gathered."""
    saved = run_state()
    if master:
        checkpoint.save(out, saved, best=best)


def record(**values):
    """A row of log.jsonl, which the tracker gets too."""
    log.log_row(out / "log.jsonl", rows, step=step, tokens=step * tokens_per_step, **values)
    progress["log_rows"] = len(rows)
    track.log(rows[-1])


# -- preflight: a step, an evaluation, a checkpoint on the real path before the long wait; then all is put back

if eval_only:
    train_loss, val_loss = evaluate()
    if master:
        print_line(
            f"step {step}: train loss {train_loss:.4f}, val loss {val_loss:.4f}, perplexity {math.exp(val_loss):.2f}"
        )
    exit_all()
if seconds_before >= 60 * max_minutes > 0 or (not max_minutes and step >= max_iters and progress["evaluated"] == step):
    if master:
        more = f"--max_minutes={2 * max_minutes:g}" if max_minutes else f"--max_iters={2 * max(1, step)}"
        print_line(f"the run in {out_dir} is finished: {step} steps, best validation loss {progress['best_val_loss']:.4f}. "  # noqa: E501
            f"To train on: python train.py --init_from=resume --out_dir={out_dir} {more}")  # fmt: skip
    exit_all()
if master:
    print_line(f"minuteGPT: {dataset} -> {out_dir}" + (f", on from step {step}" if state else ""))
    for change in changes if state else []:
        print_line(f"  changed: {change}")
    for key, value in environment(machine).items():
        if was.get(key, value) != value:
            print_line(f"  {key} was {was[key]} and is {value}: the run goes on, but not in the very same bits")
    print_line("  trial    a step, an evaluation and a checkpoint first; Ctrl-C leaves all as it was")

before = copy.deepcopy((model.state_dict(), [each.state_dict() for each in optimizers], scaler.state_dict()))
try:
    first_loss, _ = forward_backward(step)
except Exception as error:  # torch.compile can fail in many ways: no compiler, an old one, no headers
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:100]
    if isinstance(error, MemoryError) or "memory" in reason:
        raise UserError(
            f"{batch_size} rows of {block_size} tokens take more memory than there is ({reason}). Type half the "
            "--batch_size and twice the --gradient_accumulation_steps: it is the same run"
        ) from error
    if not machine.compile:
        raise
    if compile.lower() != "auto" or shard:
        raise UserError(f"--compile={compile}: torch.compile fails here ({reason}). Type --compile=false") from error
    machine.compile, machine.why[-1] = False, ("compile", f"off: it fails here ({reason})")
    train_model = DistributedDataParallel(model, broadcast_buffers=False) if replicate else model
    model.zero_grad(set_to_none=True)
    first_loss, _ = forward_backward(step)
update(0.0)
times: list[float] = []
while len(times) < 3 and sync(sum(times)) < 5:  # on a slow machine one is enough
    began = time.perf_counter()
    forward_backward(step)
    update(0.0)
    synchronize(machine.device)
    times.append(time.perf_counter() - began)
step_seconds = min(times)
began = time.perf_counter()
evaluate(1)
windows = min(eval_iters * batch_size, (min(len(train_data), len(val_data)) - 1) // block_size)
eval_seconds = (time.perf_counter() - began) * max(1.0, windows / batch_size / machine.world_size)
model.load_state_dict(before[0])
for each, saved in zip(optimizers, before[1], strict=True):
    each.load_state_dict(saved)
scaler.load_state_dict(before[2])
began, written = time.perf_counter(), run_state()
if master:
    checkpoint.save_checkpoint_file(out / "preflight.tmp", written)
    checkpoint_bytes = (out / "preflight.tmp").stat().st_size
    (out / "preflight.tmp").unlink()
save_seconds = time.perf_counter() - began
del before, written  # memory that the run may need


def clock():
    """Seconds of max_minutes that are spent: by earlier processes of the run, and by this one since it started."""
    return seconds_before + time.perf_counter() - STARTED


budget = 60 * max_minutes
steps_in_time = sync((budget - clock() - eval_seconds - save_seconds) / step_seconds)
total_steps = step + max(1, round(steps_in_time)) if max_minutes else max_iters
decay_iters = lr_decay_iters or total_steps
warmup = min(warmup_iters, decay_iters // 2)
peak, peak_source = peak_flops(machine)
flops_per_step = model.flops_per_token() * tokens_per_step
flops_per_step += sum(each.flops_per_token(block_size) for each in teachers) / 3 * tokens_per_step  # forward alone
if master:
    seconds_left = budget - clock() if max_minutes else (
        (total_steps - step) * (step_seconds + (eval_seconds + save_seconds) / eval_interval)
    )  # fmt: skip
    slow = seconds_left > 1800 and not max_minutes
    hint = "; --max_minutes=10 trains for ten minutes, and still to a good end" if slow else ""
    log.print_table(
        [
            *machine.why,
            ("model", f"{si_number(model.n_params())} parameters"
             + (f", {si_number(model.n_params(active=True))} of them active for a token" if n_expert else "")
             + f": {n_layer} layers, {n_head} heads, {n_embd} channels"),
            ("data", f"{si_number(len(train_data))} tokens to train on, {si_number(len(val_data))} to validate on"),
            ("step", f"{si_number(tokens_per_step)} tokens ({global_batch} rows of {block_size}), {step_seconds:.3g} s, "  # noqa: E501
             f"{flops_per_step / step_seconds / peak / machine.world_size:.0%} of the peak ({peak_source})"),
            ("run", f"{'about ' if max_minutes else ''}{total_steps} steps, "
             f"{total_steps * tokens_per_step / len(train_data):.3g} epochs, warmup {warmup}"
             + (f" (not {warmup_iters}: at most half the run)" if warmup < warmup_iters else "")),
            ("disk", f"{si_number(checkpoint_bytes, 'B')} a checkpoint, of which three are kept; "
             f"{si_number(shutil.disk_usage(out).free, 'B')} free"),
            ("time", f"about {format_seconds(seconds_left)}{hint}"),
        ]
    )  # fmt: skip
    V = model.config.vocab_size
    print_line(
        f"  first loss {first_loss:.3f}" + ("" if state else f"; knowing nothing would be ln({V}) = {math.log(V):.3f}")
    )
    track = Tracker(tracker, out, config, step if state else None)
    if not state:  # from here on the run is real, and an old one in its place goes
        for name in ("log.jsonl", "loss.png", "ckpt-best.pt", "ckpt-prev.pt", "ckpt.pt"):
            (out / name).unlink(missing_ok=True)
    with atomic_write(out / "config.json") as file:
        file.write(json.dumps(config, indent=2).encode())
    rows = log.open_log(out / "log.jsonl", progress["log_rows"])
    progress["log_rows"] = len(rows)
if not state:
    save()  # there is something to go on from before step 1

# -- the loop

stopped = 0  # the signal that asked us to stop


def stop(signum, frame):
    global stopped
    if stopped and signum == signal.SIGINT:
        os._exit(130)  # the second Ctrl-C: at once
    stopped = signum
    if signum == signal.SIGINT and master:
        with suppress(OSError):  # whoever read along has gone. not print(), which may be what was interrupted
            os.write(1, b"\nstopping, saved, after this step or evaluation; Ctrl-C again: at once, unsaved\n")


for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # SIGHUP: the terminal was closed. windows has none, nohup ignores it
    if signal.getsignal(getattr(signal, name, signal.SIGINT)) != signal.SIG_IGN:
        signal.signal(getattr(signal, name, signal.SIGINT), stop)
bar = tqdm(total=total_steps, initial=step, disable=not (master and sys.stderr.isatty()), unit="step", leave=False)
first_step, loop_start = step, time.perf_counter()
lap_step, lap_start = step, loop_start  # the steps since the last line, and the clock without evaluations
losses: list[float] = []  # of late, to see a spike by
while True:
    progress["step"], progress["seconds"] = step, seconds_before + time.perf_counter() - loop_start
    due = step % eval_interval == 0
    if max_minutes:  # the clock drives the schedule, and leaves time for the last evaluation and save
        trained, pause = sync(progress["seconds"]), sync(eval_seconds + save_seconds)
        left = sync(budget - clock()) - pause
        done = position = trained / (trained + max(0.0, left) + 1e-9)
        finished = left < sync(step_seconds) / 2
        # an evaluation now must not make the last one late, nor one of the untrained model shorten a short run
        due = due and left > pause * (1 if step else 20)
    else:
        done, position = step / max(1, max_iters), max(0, step - warmup) / max(1, decay_iters - warmup)
        finished = step >= max_iters
    halt = int(sync(stopped))

    if (finished or due) and progress["evaluated"] != step and not halt:
        began = time.perf_counter()
        train_loss, val_loss = evaluate()
        progress["evaluated"], better = step, val_loss < progress["best_val_loss"]
        if better:
            progress["best_val_loss"], progress["best_step"] = val_loss, step
        text = sample_text() if master or shard else ""
        eval_seconds = time.perf_counter() - began
        if master:
            print_line(f"step {step}: train loss {train_loss:.4f}, val loss {val_loss:.4f}, perplexity "
                f"{math.exp(min(val_loss, 700)):.2f}{', the best so far' if better else ''}")  # fmt: skip
            print_line(f"  {text!r}")
            progress["seconds"] = seconds_before + time.perf_counter() - loop_start
            record(seconds=progress["seconds"], val_loss=val_loss, eval_train_loss=train_loss)
        save(best=better)
        if master:
            plot.loss_picture(rows, out / "loss.png")
        save_seconds = time.perf_counter() - began - eval_seconds
        lap_start += time.perf_counter() - began
    if finished or halt:
        break

    fraction = min(1.0, (step + 1) / (warmup + 1))
    if decay_lr:
        fraction *= schedule(lr_schedule, position, min_lr / max(learning_rate, 1e-30), decay_fraction)
    loss, norm = forward_backward(step)
    if not (math.isfinite(loss) and (math.isfinite(norm) or scaler.is_enabled())):  # the scaler skips such steps itself
        activations = log.largest_activations(model, get_batch(step, 0)[0])
        if master:
            bar.close()
            starts = train_data.starts(block_size, seed, np.arange(step * global_batch, (step + 1) * global_batch))
            message = log.report_nonfinite(
                out, step, loss, norm, learning_rate * fraction, starts.tolist(), activations
            )
            print(f"error: {message}", file=sys.stderr)
            track.close()
        exit_all(1)
    if len(losses) == 20 and loss > statistics.median(losses) + 1 and master:
        print_line(f"warning: the loss jumped from about {statistics.median(losses):.3f} to {loss:.3f} at step {step}")
    losses = [*losses[-19:], loss]
    router = update(fraction)
    step += 1

    bar.update()
    if step % log_interval == 0 and master:
        now = time.perf_counter()
        step_seconds = (now - lap_start) / (step - lap_step)
        lap_step, lap_start = step, now
        eta = left if max_minutes else (
            (max_iters - step) * (step_seconds + (eval_seconds + save_seconds) / eval_interval)
        )  # fmt: skip
        seconds = seconds_before + now - loop_start
        record(seconds=seconds, lr=learning_rate * fraction, grad_norm=norm, train_loss=loss,
               **{key: value.item() for key, value in router.items()})  # fmt: skip
        print_line(log.step_line(
            step, 0 if max_minutes else max_iters, done if max_minutes else step / max_iters, loss,
            learning_rate * fraction, norm, tokens_per_step / step_seconds,
            flops_per_step / step_seconds / (peak * machine.world_size), eta,
        ))  # fmt: skip
bar.close()

# -- the end: saved, and told

if halt:
    save()
if master:
    track.close()
    if halt:
        print_line(f"stopped by {signal.Signals(halt).name} at step {step}, and saved")
    loss, best_step = progress["best_val_loss"], progress["best_step"]
    speed = (step - first_step) * tokens_per_step / (time.perf_counter() - loop_start)
    log.print_table(
        [
            ("best validation loss", f"{loss:.4f} at step {best_step}" if loss < math.inf else "not yet measured"),
            ("time", f"{format_seconds(time.perf_counter() - STARTED)}; {format_seconds(progress['seconds'])} of training in all"),  # noqa: E501
            ("speed", f"{si_number(speed)} tokens/s, evaluations included"),
            ("peak memory", si_number(peak_memory(machine.device), "B")),
            ("sample", f"python sample.py --out_dir={out_dir}"),
            ("resume", f"python train.py --init_from=resume --out_dir={out_dir}"
             + ("" if halt else f" --max_minutes={2 * max_minutes:g}" if max_minutes else f" --max_iters={2 * step}")),
            ("evaluate", f"python evaluate.py --out_dir={out_dir}"),
        ]
    )  # fmt: skip
exit_all(128 + halt if halt else 0)
