"""What the scripts in prepare/ share: pieces of text -> tokenizer -> shards, in parallel, and a report at the end."""

import json
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from minutegpt.data import tokenizer as tokenizers
from minutegpt.data.dataset import DATA, open_split, parse_mixture
from minutegpt.data.download import TextMissing
from minutegpt.data.parallel import ordered_map
from minutegpt.data.shards import SHARD_TOKENS, ShardWriter, open_dataset, publish
from minutegpt.data.sources import Piece, Source
from minutegpt.data.tokenizer import Tokenizer
from minutegpt.errors import ROOT, UserError
from minutegpt.files import atomic_write, run_lock

BPE_SAMPLE = 200_000_000  # characters that a BPE is trained on, at most
SYNC_SECONDS = 20.0  # what a killed preparation has to do again, at most
FEW_TOKENS_PER_ID = 100  # below it the report warns of a vocabulary that is too large
REPORT_TOKENS = 10_000_000  # the report counts bigrams in the first ones
DEFAULT_MODEL = {"n_layer": 6, "n_embd": 384}  # model.py's: the report tells the embedding's share of it


def ensure_dataset(dataset: str, fallback: str = "") -> str:
    """Runs prepare/<name>.py for each dataset of `dataset` that is not there; gives the one to train on.

    Where the text can neither be found nor downloaded, that is the fallback, if one is given. Exits with 2, the script
    having told why, where there is none.
    """
    for name in parse_mixture(dataset):
        script = ROOT / "prepare" / f"{name}.py"
        if (DATA / name / "meta.json").exists() or not script.exists():
            continue  # shards.py has the words for a dataset that nobody can prepare
        print(f"preparing the dataset: python prepare/{name}.py", flush=True)
        status = subprocess.run([sys.executable, str(script)]).returncode
        if status == TextMissing.status and fallback:
            print(f"{name} cannot be had here: training on {fallback}, the dataset that needs no network", flush=True)
            return ensure_dataset(fallback)
        if status:
            raise SystemExit(2)
    return dataset


def make_tokenizer(kind: str, vocab_size: int, source: Source, sample: int, workers: int | None = None) -> Tokenizer:
    """char sees the whole corpus, bpe the first `sample` characters of its training part, byte and gpt2 nothing.

    kind may also be the folder of a prepared dataset, whose tokenizer is taken, or of GPT-2's files.
    """
    if kind == "byte":
        return tokenizers.byte_tokenizer()
    if kind == "gpt2":
        return tokenizers.gpt2_tokenizer()
    if kind == "char":
        found: set[str] = set()
        for piece in (piece for batch, _ in source(None) for piece in batch):
            found.update(piece.text, "\n" * piece.last)  # type: ignore[arg-type]
        return tokenizers.char_tokenizer("".join(found))
    if kind == "bpe":
        tokenizer = tokenizers.train_bpe(_training_text(source, sample), vocab_size, workers)
        if tokenizer.vocab_size < vocab_size:
            print(f"the text has pairs for {tokenizer.vocab_size} ids only, not {vocab_size}: so many it gets")
        return tokenizer
    if (Path(kind) / "merges.txt").exists():
        return tokenizers.gpt2_tokenizer(Path(kind))
    if (Path(kind) / "meta.json").exists():
        return tokenizers.from_json(open_dataset(kind)["tokenizer"])
    raise UserError(f"--tokenizer={kind} is none of {', '.join(tokenizers.KINDS)}, and no folder of a dataset")


def _training_text(source: Source, sample: int) -> Iterator[str]:
    for batch, _ in source(None):
        for piece in batch:
            if piece.split == "train" and sample > 0:
                sample -= len(piece.text)
                yield piece.text  # type: ignore[misc]
        if sample <= 0:
            return


def write_dataset(
    name: str,
    source: Source,
    tokenizer: str,
    vocab_size: int = 0,
    data_dir: str = "",
    max_tokens: int = 0,
    workers: int = 0,
    settings: dict[str, Any] | None = None,
    shard_tokens: int = SHARD_TOKENS,
) -> Path:
    """Prepare data_dir/name from a source, print the report, return the folder.

    max_tokens: stop after the batch that brings the training split there; 0 is the whole corpus.
    workers: processes, 0 for one a CPU. settings: what tells this corpus from another, such as its name; a preparation
    that was killed goes on where the settings are the same, without a lost or doubled document.
    """
    folder = Path(data_dir or DATA) / name
    wanted = {"tokenizer": tokenizer, "vocab_size": vocab_size, "max_tokens": max_tokens, **(settings or {})}
    with run_lock(folder):
        progress = _read_progress(folder, wanted)
        if progress is None:
            sample = min(BPE_SAMPLE, 5 * max_tokens or BPE_SAMPLE)
            made = make_tokenizer(tokenizer, vocab_size, source, sample, workers or None)
            progress = {"settings": wanted, "tokenizer": made.to_json(), "source": None, "finished": False}
            progress["splits"] = {split: {"characters": 0, "bytes": 0, "writer": None} for split in ("train", "val")}
        if not progress["finished"]:
            _write_shards(folder, source, progress, max_tokens, workers or None, shard_tokens)
        splits = {}
        for split, done in progress["splits"].items():
            shards = done["writer"]["shards"]
            tokens = sum(shard["tokens"] for shard in shards)
            splits[split] = {"tokens": tokens, "bytes": done["bytes"], "characters": done["characters"]}
            splits[split]["shards"] = shards
            if not tokens:
                (folder / "progress.json").unlink(missing_ok=True)
                raise UserError(f"the corpus is too small: nothing was left for its {split} split. Add more text")
        meta = {"dataset": name, "tokenizer": progress["tokenizer"], "splits": splits}
        publish(folder, meta)
        (folder / "progress.json").unlink(missing_ok=True)
        meta["report"] = report(folder)
        publish(folder, meta)
    print_report(folder)
    return folder


def _write_shards(
    folder: Path, source: Source, progress: dict[str, Any], max_tokens: int, workers: int | None, shard_tokens: int
) -> None:
    """Encode what the source still has, into shards that `progress`, brought up to date, then names."""
    splits, vocab_size = progress["splits"], progress["tokenizer"]["vocab_size"]
    writers = {split: ShardWriter(folder, split, vocab_size, shard_tokens, splits[split]["writer"]) for split in splits}

    def sync(finished: bool) -> None:
        for split, writer in writers.items():
            if finished:
                writer.close()
            splits[split]["writer"] = writer.sync()
        progress["finished"] = finished
        if progress["source"] is not None:
            with atomic_write(folder / "progress.json") as file:
                file.write(json.dumps(progress).encode())

    walk = source(progress["source"])
    encoded = ordered_map(encode_batch, walk, workers, take_tokenizer, (progress["tokenizer"],))
    total, unit, synced = max_tokens or None, writers["train"].tokens, time.monotonic()
    with tqdm(total=total, initial=unit, unit=" tokens", unit_scale=True, desc=folder.name, disable=None) as bar:
        for results, progress["source"] in encoded:
            for split, (ids, characters, size) in results.items():
                writers[split].write(ids)
                splits[split]["characters"] += characters
                splits[split]["bytes"] += size
                bar.update(len(ids))
            if max_tokens and writers["train"].tokens >= max_tokens:
                break
            if progress["source"] is not None and time.monotonic() - synced > SYNC_SECONDS:
                sync(finished=False)
                synced = time.monotonic()
    sync(finished=True)


def _read_progress(folder: Path, wanted: dict[str, Any]) -> dict[str, Any] | None:
    path = folder / "progress.json"
    if not path.exists():
        return None
    try:
        progress = json.loads(path.read_bytes())
        same = progress["settings"] == wanted
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged: delete it, which starts this preparation anew") from None
    if not same:
        raise UserError(
            f"{path} is of a preparation that was stopped, with other settings: {progress['settings']}. Take the same "
            "ones to go on with it, or delete that file to start anew"
        )
    print(f"going on with the preparation of {folder.name} that was stopped")
    return progress


_tokenizer: Tokenizer  # one a process


def take_tokenizer(saved: dict[str, Any]) -> None:
    global _tokenizer
    _tokenizer = tokenizers.from_json(saved)


def encode_batch(batch: tuple[list[Piece], Any]) -> tuple[dict[str, tuple[np.ndarray, int, int]], Any]:
    """A batch -> for each split its ids, characters and bytes; and the batch's state."""
    pieces, state = batch
    ids: dict[str, list[np.ndarray]] = defaultdict(list)
    characters: dict[str, int] = defaultdict(int)
    size: dict[str, int] = defaultdict(int)
    smallest = np.uint16 if _tokenizer.vocab_size <= 1 << 16 else np.uint32  # what travels between processes
    for split, text, last in pieces:
        if isinstance(text, np.ndarray):
            if text.max() >= _tokenizer.vocab_size:
                raise UserError(f"id {text.max()} is outside a vocabulary of {_tokenizer.vocab_size}: --tokenizer?")
            found = text
            size[split] += int(_tokenizer.token_bytes()[text].sum())
        elif isinstance(text, bytes):
            found = _tokenizer.encode_bytes(text)
            size[split] += len(text)
        else:
            text += "\n" * (last and _tokenizer.end_token is None)
            found = _tokenizer.encode_array(text)
            size[split] += len(text) if text.isascii() else len(text.encode())
        ids[split].append(found.astype(smallest))
        characters[split] += len(text)
        if last and _tokenizer.end_token is not None:
            ids[split].append(np.array([_tokenizer.end_token], smallest))
    return {split: (np.concatenate(ids[split]), characters[split], size[split]) for split in ids}, state


# ---------------------------------------------------------------------------------------------- the report


def report(folder: Path) -> dict[str, Any]:
    """What the training split of a prepared dataset looks like to a model, from its first REPORT_TOKENS ids."""
    train = open_split(folder, "train")
    splits, vocab_size = train.meta["splits"], train.meta["tokenizer"]["vocab_size"]
    ids = train.tokens(0, min(len(train), REPORT_TOKENS)).astype(np.int64)
    n_bigrams = len(np.unique(ids[:-1] * vocab_size + ids[1:]))
    embedding = vocab_size * DEFAULT_MODEL["n_embd"]
    blocks = 12 * DEFAULT_MODEL["n_layer"] * DEFAULT_MODEL["n_embd"] ** 2
    return {
        "bytes_per_token": splits["train"]["bytes"] / splits["train"]["tokens"],
        "coverage": len(np.unique(ids)) / vocab_size,
        "bigrams": n_bigrams,
        "bigrams_share": n_bigrams / vocab_size**2,
        "bigram_mean_count": (len(ids) - 1) / max(1, n_bigrams),
        "embedding_share": embedding / (embedding + blocks),
        "tokens_per_id": splits["train"]["tokens"] / vocab_size,
    }


def print_report(folder: Path) -> None:
    meta = open_dataset(folder)
    about, vocab_size, kind = meta["report"], meta["tokenizer"]["vocab_size"], meta["tokenizer"]["kind"]
    for name, split in meta["splits"].items():
        print(f"{name:5} {split['characters']:>15,} characters {split['tokens']:>15,} tokens")
    print(f"{kind} vocabulary of {vocab_size:,} ids, {about['coverage']:.1%} of them seen in training text")
    print(f"{about['bytes_per_token']:.2f} bytes a token, {about['tokens_per_id']:,.0f} training tokens an id")
    print(
        f"{about['bigrams']:,} of {vocab_size**2:,} bigrams occur ({about['bigrams_share']:.2%}), each "
        f"{about['bigram_mean_count']:,.1f} times on average"
    )
    print(f"the embedding would take {about['embedding_share']:.1%} of the default model's parameters")
    if about["tokens_per_id"] < FEW_TOKENS_PER_ID and kind != "char":
        fitting = max(256, meta["splits"]["train"]["tokens"] // FEW_TOKENS_PER_ID)
        print(
            f"warning: the vocabulary is large for this text, most ids are too rare to learn; one of about {fitting:,} "
            "ids (--tokenizer=bpe --vocab_size=N), or --tokenizer=char, would suit it better"
        )
    print(f"written to {folder}")
