"""Writes a model in other formats:  python export.py --out_dir=out-shakespeare-char --format=hf

hf: a folder that Hugging Face's transformers loads. safetensors: one file with our names, for any model. html: one file
that any browser opens, in which the model writes. minutegpt: the other direction, GPT-2 as a run's folder:
python export.py --out_dir=gpt2 --format=minutegpt
"""

import minutegpt.errors  # noqa: F401, I001  first: it finds the environment that has torch

from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path

from minutegpt import checkpoint, huggingface, page
from minutegpt.config import configure
from minutegpt.data.dataset import open_data
from minutegpt.data.tokenizer import from_json
from minutegpt.errors import UserError
from minutegpt.files import atomic_write
from minutegpt.log import si_number
from minutegpt.page.pack import DTYPES, write_model
from minutegpt.quantize import FORMATS, pack

# ----------------------------------------------------------------------------------------------------------------
# every setting, with its default; --key=value overrides it
out_dir = "out"  # the run's folder; or gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder with one of these
ckpt = "best"  # best (lowest validation loss), latest
format = "hf"  # hf, safetensors, html, minutegpt; int8, int4, int4-tensor: a run's folder of 1/4 or 1/8 the size
dtype = "int8"  # of the weights in html: int8, float16
to = ""  # where to; default: OUT_DIR/hf (a folder), OUT_DIR/model.safetensors, OUT_DIR/model.html, out-OUT_DIR, ...
overwrite = False  # replace what is there
dataset = ""  # the dataset that has the vocabulary, for weights without one: nanoGPT's
# ----------------------------------------------------------------------------------------------------------------
config, given = configure(globals(), __file__)
globals().update(config)
if dtype not in DTYPES:
    raise UserError(f"--dtype={dtype} is not one of {', '.join(DTYPES)}. Type one of them")
if "dtype" in given and format != "html":
    raise UserError(f"--dtype has no effect on --format={format}. Leave it out, or type --format=html")


def make_folder(folder: Path, names: Collection[str]) -> None:
    """Makes the folder. Raises UserError if it has files of these names, unless --overwrite is given.

    An old config.json is removed, so that it is never next to new weights.
    """
    existing = [name for name in names if (folder / name).exists()]
    if existing and not overwrite:
        raise UserError(f"{folder} already has {', '.join(existing)}. Replace: --overwrite; write elsewhere: --to=NAME")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if "config.json" in names:
            (folder / "config.json").unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}. Write elsewhere: --to=NAME") from None


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        with atomic_write(folder / name, len(content)) as file:
            file.write(content)


def write_hf(folder: Path) -> None:
    files = huggingface.hf_files(model, tokenizer)
    make_folder(folder, files)
    write_files(folder, files)


def write_safetensors(path: Path) -> None:
    make_folder(path.parent, [path.name])
    write_files(path.parent, {path.name: huggingface.weights_file(model, saved_tokenizer)})


def write_html(path: Path) -> None:
    if not tokenizer:
        raise UserError(f"the page needs a vocabulary, and {out_dir} has none. Type --dataset=NAME")
    make_folder(path.parent, [path.name])
    data = page.read(Path(out_dir) / "run.html") or {}
    if not isinstance(data.get("run"), dict):  # a run of an earlier version, or no run: the page has the model alone
        progress = {"step": state["step"], "seconds": state.get("seconds", 0.0), "state": "finished"}
        name, dataset = Path(out_dir).resolve().name, state["config"].get("dataset", "")
        data = {"run": {"name": name, "dataset": dataset, **progress}}
    write_model(path, model, tokenizer, dtype, data)


def write_run(folder: Path) -> None:
    make_folder(folder, (checkpoint.LATEST, checkpoint.BEST, checkpoint.PREVIOUS))
    weights, run = model.state_dict(), dict(state)
    if format in FORMATS:
        weights = pack(weights, format)
        run = {key: value for key, value in run.items() if key not in ("optimizer", "scaler")}  # only for training
    run |= {"model": weights, "model_config": asdict(model.config), "tokenizer": saved_tokenizer}
    checkpoint.save(folder, run, best=True)
    (folder / checkpoint.PREVIOUS).unlink(missing_ok=True)


run_folder = Path(out_dir) if Path(out_dir).is_dir() else Path(f"out-{out_dir}")  # GPT-2 by its name has no folder
WRITERS = {  # format: (the function that writes it, where to by default)
    "hf": (write_hf, run_folder / "hf"),
    "safetensors": (write_safetensors, run_folder / "model.safetensors"),
    "html": (write_html, run_folder / "model.html"),
    "minutegpt": (write_run, Path(f"out-{Path(out_dir).name}")),
    **{name: (write_run, run_folder / name) for name in FORMATS},
}
write, default_target = WRITERS[format]
target = Path(to) if to else default_target

state = huggingface.load_any(out_dir, ckpt)
model = checkpoint.build_model(state)
saved_tokenizer = state["tokenizer"] or (open_data(dataset, "train").meta["tokenizer"] if dataset else None)
tokenizer = from_json(saved_tokenizer) if saved_tokenizer else None
if tokenizer and tokenizer.vocab_size > model.config.vocab_size:
    raise UserError(
        f"the vocabulary has {tokenizer.vocab_size} tokens, the model in {out_dir} only {model.config.vocab_size}. "
        "Type --dataset=NAME, the dataset it was trained on"
    )
write(target)
print(f"{si_number(model.n_params())} parameters of {out_dir} -> {target}")
if not tokenizer:
    print("these weights have no tokenizer: --dataset=NAME adds that dataset's")
