"""Weights to and from other formats:  python export.py --out_dir=out-shakespeare-char --format=hf

hf: a folder that Hugging Face's transformers loads. safetensors: one file, our names, any model. minutegpt: the other
way, a run's folder for sample.py and evaluate.py, from GPT-2:  python export.py --out_dir=gpt2 --format=minutegpt
"""

import minutegpt.errors  # noqa: F401, I001  first: it finds the environment that has torch

from dataclasses import asdict
from pathlib import Path

from minutegpt import checkpoint, huggingface
from minutegpt.config import configure, require
from minutegpt.files import atomic_write
from minutegpt.huggingface import hf_files, weights_file
from minutegpt.quantize import FORMATS, pack
from minutegpt.log import si_number
from minutegpt.data.dataset import open_data
from minutegpt.errors import UserError
from minutegpt.data.tokenizer import from_json

# ----------------------------------------------------------------------------------------------------------------
# every knob, with its default; --key=value overrides it
out_dir = "out"  # the run's folder; or gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder that has one of these
ckpt = "best"  # best (lowest validation loss), latest
format = "hf"  # hf, safetensors, minutegpt; int8, int4, int4-tensor: a run's folder of a quarter or an eighth the size
to = ""  # what to write, by default OUT_DIR/hf (a folder), OUT_DIR/model.safetensors, out-OUT_DIR or OUT_DIR/int8
overwrite = False  # take the place of what is there
dataset = ""  # where the vocabulary comes from, for weights that have none with them: nanoGPT's
# ----------------------------------------------------------------------------------------------------------------
config, given = configure(globals(), __file__)
globals().update(config)
require(config, one_of={"format": ("hf", "safetensors", "minutegpt", *FORMATS)})

state = huggingface.load_any(out_dir, ckpt)
model = checkpoint.build_model(state)
saved = state["tokenizer"] or (open_data(dataset, "train").meta["tokenizer"] if dataset else None)
tokenizer = from_json(saved) if saved else None
if tokenizer and tokenizer.vocab_size > model.config.vocab_size:
    raise UserError(
        f"the vocabulary has {tokenizer.vocab_size} tokens, the model in {out_dir} only {model.config.vocab_size}. "
        "Type --dataset=NAME, the dataset it was trained on"
    )

inside = Path(out_dir) if Path(out_dir).is_dir() else Path(f"out-{out_dir}")  # GPT-2 by its name has no folder
default: dict[str, str | Path] = {"safetensors": inside / "model.safetensors", "minutegpt": f"out-{Path(out_dir).name}"}
target = Path(to or default.get(format, inside / format))
folder = target.parent if format == "safetensors" else target
if format == "hf":
    files = hf_files(model, tokenizer)
elif format == "safetensors":
    files = {target.name: weights_file(model, saved)}
else:
    files = dict.fromkeys((checkpoint.LATEST, checkpoint.BEST, checkpoint.PREVIOUS), b"")
if (there := [name for name in files if (folder / name).exists()]) and not overwrite:
    raise UserError(f"{folder} has {', '.join(there)} already: --overwrite takes their place, --to=NAME goes elsewhere")
try:
    folder.mkdir(parents=True, exist_ok=True)
    if format == "hf":
        (folder / "config.json").unlink(missing_ok=True)  # an old one must not meet the new weights
except OSError as error:
    raise UserError(f"cannot write {folder}: {error.strerror}. --to=NAME goes elsewhere") from None

if format in ("minutegpt", *FORMATS):
    weights = model.state_dict()
    if format in FORMATS:
        weights = pack(weights, format)
        state = {key: value for key, value in state.items() if key not in ("optimizer", "scaler")}  # training's alone
    ours = {"model": weights, "model_config": asdict(model.config), "tokenizer": saved}
    checkpoint.save(folder, state | ours, best=True)
    (folder / checkpoint.PREVIOUS).unlink(missing_ok=True)
else:
    for name, content in files.items():
        with atomic_write(folder / name, len(content)) as file:
            file.write(content)
print(f"{si_number(model.n_params())} parameters of {out_dir} -> {target}")
if not tokenizer:
    print("there is no tokenizer with these weights: --dataset=NAME takes that dataset's along")
