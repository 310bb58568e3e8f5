"""A development split for any dataset: choices are made on it, so that the validation text stays unseen.

dev_dataset("shakespeare_char")  # makes shakespeare_dev from the training split alone, and returns its name

The first nine tenths of the training tokens train, and the last tenth validates; the tokenizer stays as it is. Where
the tokenizer marks the end of a document, the cut is moved to the end of one.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from minutegpt.data.dataset import DATA, Split, open_split, parse_mixture
from minutegpt.data.pipeline import ensure_dataset, print_report, report
from minutegpt.data.shards import ShardWriter, open_dataset, publish
from minutegpt.data.tokenizer import Tokenizer, from_json
from minutegpt.errors import UserError
from minutegpt.files import run_lock

PIECE = 1_000_000  # tokens that are copied at a time
NAMES = {"shakespeare_char": "shakespeare_dev"}  # where prepare/ has a script for it; elsewhere NAME_dev


def dev_dataset(dataset: str) -> str:
    """Prepares the development dataset of each part of `dataset`, NAME or NAME:WEIGHT,...; returns the same of them."""
    parts = parse_mixture(ensure_dataset(dataset))
    names = {name: NAMES.get(name, f"{name}_dev") for name in parts}
    for name, dev in names.items():
        if "development_of" in open_dataset(DATA / name):  # it is one already
            names[name] = name
        else:
            write_dev(name, dev)
    return ",".join(names[name] + (f":{weight:g}" if len(parts) > 1 else "") for name, weight in parts.items())


def write_dev(name: str, dev: str, data_dir: str | Path = "") -> Path:
    """Prepares data_dir/dev from the training split of data_dir/name, unless that has been done; returns the folder."""
    data = Path(data_dir or DATA)
    source = open_dataset(data / name)
    origin = {"dataset": name, "crc32": source["crc32"]}
    folder = data / dev
    if (folder / "meta.json").exists():
        found = open_dataset(folder).get("development_of")
        if found == origin:
            return folder
        if not found:  # a dataset of the user's
            raise UserError(f"{folder} is not a development split of {name}. Rename it, or delete it")
    train, tokenizer = open_split(data / name, "train"), from_json(source["tokenizer"])
    cut = last_tenth(train, tokenizer.end_token)
    if not 1 < cut < len(train) - 1:
        raise UserError(f"the training split of {name} is too small to be divided. Prepare it with more text")
    with run_lock(folder):
        splits = {
            split: write_split(train.tokens, bounds, ShardWriter(folder, split, tokenizer.vocab_size), tokenizer)
            for split, bounds in (("train", (0, cut)), ("val", (cut, len(train))))
        }
        meta = {"dataset": dev, "tokenizer": source["tokenizer"], "splits": splits, "development_of": origin}
        publish(folder, meta)
        publish(folder, meta | {"report": report(folder)})
    print_report(folder)
    return folder


def last_tenth(train: Split, end_token: int | None) -> int:
    """Where the last tenth of the tokens begins: after the end of a document, where one ends near there."""
    cut = int(len(train) * 0.9)
    while end_token is not None and cut > 0:
        start = max(0, cut - PIECE)
        ends = np.flatnonzero(train.tokens(start, cut) == end_token)
        if len(ends) and start + ends[-1] < 0.8 * len(train):
            break  # a long document: it is divided
        if len(ends):
            return start + int(ends[-1]) + 1
        cut = start
    return int(len(train) * 0.9)


def write_split(
    tokens: Callable[[int, int], np.ndarray], bounds: tuple[int, int], writer: ShardWriter, tokenizer: Tokenizer
) -> dict[str, Any]:
    """Copies tokens(start, stop) between the bounds; returns what meta.json says of the split."""
    size, characters, length = 0, 0, tokenizer.token_bytes()
    for at in range(*bounds, PIECE):
        ids = tokens(at, min(bounds[1], at + PIECE))
        writer.write(ids)
        size += int(length[ids].sum())
        text = np.frombuffer(tokenizer.decode_bytes(ids[ids != tokenizer.end_token].tolist()), np.uint8)
        characters += int((text & 0xC0 != 0x80).sum())  # UTF-8: each character has one byte that begins it
    return {"tokens": writer.tokens, "bytes": size, "characters": characters, "shards": writer.close()}
