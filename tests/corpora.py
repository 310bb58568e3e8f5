"""Small corpora in every form, the prepare scripts run on them, and what came out."""

import bz2
import csv
import gzip
import io
import json
import lzma
import random
from functools import partial

import harness
import numpy as np
from harness import ROOT

from minutegpt.data.dataset import open_split
from minutegpt.data.shards import ShardWriter, publish
from minutegpt.data.tokenizer import END, byte_tokenizer, from_json

WORDS = "the quick brown fox jumps over a lazy dog and then it sleeps\nwell; naïve café 🙂 12 345\n\nso it is"


def some_text(n_words, seed=0):
    return " ".join(random.Random(seed).choices(WORDS.split(" "), k=n_words))


def run(script, *options, cwd=ROOT, **environment):
    """python prepare/<script>.py, with no network to wait for."""
    env = {"HF_HUB_OFFLINE": "1", **environment}
    return harness.run(f"prepare/{script}.py", *map(str, options), cwd=cwd, env=env)


def decoded(folder, split):
    ids = open_split(folder, split)
    return from_json(ids.meta["tokenizer"]).decode(ids.tokens(0, len(ids)).tolist())


def documents(n=200):
    return [some_text(1 + i % 50, seed=i) for i in range(n)]


def write_documents(folder, form, documents):
    """The same documents in every form that is read: the expected training and validation texts do not change."""
    folder.mkdir(parents=True, exist_ok=True)
    if form == "folder":
        for i, document in enumerate(documents):
            (folder / f"{i:05}.txt").write_bytes(document.encode())
        return folder
    half = len(documents) // 2
    for name, part in (("a", documents[:half]), ("b", documents[half:])):  # two files: order and joins matter
        write_rows(folder / f"{name}.{form}", part)
    return folder


def write_rows(path, documents):
    """A file of rows, in the format and compression that its name says."""
    kind = path.name.removesuffix(path.suffix if path.suffix in COMPRESS else "").rpartition(".")[2]
    rows = [{"n": 1, "text": document} for document in documents]
    if kind == "parquet":
        import pyarrow.parquet

        buffer = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer, row_group_size=30)
        raw = buffer.getvalue()
    elif kind in ("csv", "tsv"):
        text = io.StringIO(newline="")
        writer = csv.writer(text, delimiter="\t" if kind == "tsv" else ",")
        writer.writerows([["n", "text"], *([row["n"], row["text"]] for row in rows)])
        raw = text.getvalue().encode()
    elif kind == "json":
        raw = json.dumps(rows, indent=1, ensure_ascii=False).encode()
    elif kind == "txt":
        raw = f"\n{END}\n".join(documents).encode()
    else:
        raw = "\n".join(map(json.dumps, rows)).encode()
    path.write_bytes(COMPRESS.get(path.suffix, bytes)(raw))


def compress_zstd(raw):
    import pyarrow

    return pyarrow.Codec("zstd").compress(raw, asbytes=True)


def compress_lz4(raw):
    import pyarrow

    buffer = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(buffer, "lz4") as stream:
        stream.write(raw)
    return buffer.getvalue().to_pybytes()


COMPRESS = {
    ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": compress_zstd, ".lz4": compress_lz4,
    ".lzma": partial(lzma.compress, format=lzma.FORMAT_ALONE),
}  # fmt: skip


KILLABLE = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from minutegpt.data import pipeline, sources

if __name__ == "__main__":
    pipeline.SYNC_SECONDS, sources.BATCH = 0.0, 8000
    source = sources.from_input(Path({folder!r}))
    pipeline.write_dataset("d", source, "bpe", 300, {out!r}, workers={workers}, shard_tokens=3000)
"""


def write_ids(folder, train, val, tokenizer=None, shard_tokens=1000, **meta):
    """A dataset of these ids, as the prepare scripts write it."""
    tokenizer = tokenizer or byte_tokenizer()
    folder.mkdir(parents=True, exist_ok=True)
    splits = {}
    for split, ids in (("train", train), ("val", val)):
        writer = ShardWriter(folder, split, tokenizer.vocab_size, shard_tokens)
        writer.write(np.asarray(ids))
        splits[split] = {"tokens": len(ids), "bytes": len(ids), "shards": writer.close()}
    publish(folder, {"dataset": folder.name, "tokenizer": tokenizer.to_json(), "splits": splits, **meta})
    return folder


def ids_of(n, seed=0, vocab_size=256):
    return np.random.default_rng(seed).integers(vocab_size, size=n)
