"""The model in a form that a web page reads: minutegpt/page/weights.js is the other half.

    write_model(path, model, tokenizer, "int8", data)  # one file: the page of the run, and the model in it
    tensors, content = pack_model(model, "int8")  # a list for JSON; the bytes of all tensors, one after another

int8 is the form of minutegpt/quantize.py: matrices become integers and a bfloat16 scale per row. float16 halves them.
Biases and norm weights stay float32. An n-gram table has rows that no text ever reached, which are zero: where that is
smaller, the file has one bit per row and only the other rows.
"""

import base64
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minutegpt import page, quantize
from minutegpt.data.tokenizer import Tokenizer
from minutegpt.errors import UserError
from model import GPT

DTYPES = ("int8", "float16")
WORKER = ("engine.js", "weights.js", "tokenizer.js", "worker.js")  # what runs in the Worker, as one function


def write_model(path: Path, model: GPT, tokenizer: Tokenizer, dtype: str, data: dict[str, Any]) -> None:
    """Writes the page with the model in it. data: that of the run's page, run.html; at least data["run"]["name"]."""
    tensors, content = pack_model(model, dtype)
    run = {"dataset": "", "step": 0, "state": "", **data["run"], "live": False}
    if run["state"] == "training":  # it trains on, or was killed
        run["state"] = "not finished"
    data = {"baselines": {"uniform": math.log(tokenizer.vocab_size)}, **data}
    about = {
        "config": asdict(model.config), "vocabulary": tokenizer.to_json(), "tensors": tensors, "dtype": dtype,
        "n_params": model.n_params(),
    }  # fmt: skip
    sources = [(page.FOLDER / name).read_text(encoding="utf-8") for name in WORKER]
    scripts = {
        "worker": "\n".join(["function modelWorker() {", *sources, "}"]),
        "play": (page.FOLDER / "play.js").read_text(encoding="utf-8"),
    }
    payload = {"weights": base64.b64encode(content).decode()}
    page.write(path, {**data, "run": run, "model": about}, scripts, payload)


def page_weights(model: GPT, dtype: str) -> dict[str, Tensor]:
    """The state dict in the precision of the page, each matrix once. `quantize.unpack` returns what it is worth."""
    weights = model.state_dict()
    if model.config.tie:
        del weights["transformer.wte.weight"]
    if dtype == "int8":
        return quantize.pack(weights, dtype)
    weights = {name: w.half() if w.ndim > 1 else w for name, w in weights.items()}
    if large := [name for name, w in weights.items() if not w.isfinite().all()]:
        raise UserError(f"{large[0]} has values that float16 does not have. Leave out --dtype=float16")
    return weights


def pack_model(model: GPT, dtype: str) -> tuple[list[dict[str, Any]], bytes]:
    """dtype: one of DTYPES. The list has name, kind, shape and sparse of each tensor, in the order of the bytes."""
    weights = page_weights(model, dtype)
    tensors, parts = [], []
    for name, w in weights.items():
        stem, _, kind = name.rpartition(".")
        if kind == "scale" and f"{stem}.int8" in weights:
            continue
        about: dict[str, Any] = {"name": stem if kind == "int8" else name, "shape": [*w.shape], "sparse": False}
        tensors.append(about)
        if w.ndim < 2:
            about["kind"] = "float32"
            parts.append(little_endian(w.float()))
            continue
        about["kind"] = dtype
        rows = w.flatten(0, -2)  # (R, C): the experts of a layer, one after another
        columns = [rows]
        if dtype == "int8":
            columns = [weights[f"{stem}.scale"].view(torch.int16).flatten(0, -2), rows]  # (R, 1), the bits of bfloat16
        used = rows.ne(0).any(1)  # (R,)
        row_bytes = sum(column.nbytes for column in columns) // len(rows)
        about["sparse"] = ".ngrams." in name and len(used) / 8 < (~used).sum().item() * row_bytes
        if about["sparse"]:
            parts.append(np.packbits(used.numpy(), bitorder="little").tobytes())
            columns = [column[used] for column in columns]
        parts += [little_endian(column) for column in columns]
    return tensors, b"".join(parts)


def little_endian(w: Tensor) -> bytes:
    array = w.contiguous().numpy()
    return array.astype(array.dtype.newbyteorder("<")).tobytes()
