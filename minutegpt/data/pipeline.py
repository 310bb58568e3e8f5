"""From text to a prepared dataset: pieces of text -> tokenizer -> ids -> shards, in parallel, with a report.

By hand, and with the same result for Tiny Shakespeare, it is this:

    text = Path("tinyshakespeare.txt").read_text(encoding="utf-8")
    characters = sorted(set(text))  # the vocabulary: "\\n", " ", "!", ..., "z"
    id_of = {character: i for i, character in enumerate(characters)}
    ids = np.array([id_of[character] for character in text], np.uint16)  # (N,): 18, 47, 56, 57, 58, ...
    train, val = ids[: int(len(ids) * 0.9)], ids[int(len(ids) * 0.9) :]
    x, y = train[0:8], train[1:9]  # 8 characters, and the character that follows each
    assert "".join(characters[i] for i in x) == "First Ci" and "".join(characters[i] for i in y) == "irst Cit"

The rest is for texts that do not fit in memory, for several processes, and for a preparation that is killed.
"""

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from minutegpt.data import tokenizer as tokenizers
from minutegpt.data.dataset import DATA, open_split, parse_mixture
from minutegpt.data.download import TextMissing
from minutegpt.data.parallel import ordered_map
from minutegpt.data.shards import SHARD_TOKENS, ShardWriter, dataset_fingerprint, open_dataset, publish
from minutegpt.data.sources import Piece, Source, fingerprint, skipped_rows
from minutegpt.data.tokenizer import END, Tokenizer
from minutegpt.errors import ROOT, UserError
from minutegpt.files import atomic_write, run_lock

BPE_SAMPLE = 200_000_000  # the most characters that a BPE is trained on
SYNC_SECONDS = 20.0  # the most work that a killed preparation has to repeat
FEW_TOKENS_PER_ID = 100  # the report warns of a vocabulary with fewer
REPORT_TOKENS = 10_000_000  # the report counts bigrams in the first ones
DEFAULT_MODEL = {"n_layer": 6, "n_embd": 384}  # model.py's, for the embedding's share of the parameters


def ensure_dataset(dataset: str, fallback: str = "") -> str:
    """Runs prepare/<name>.py for each dataset of `dataset` that is not prepared. Returns the dataset to train on.

    That is the fallback, if one is named, where the text can neither be found nor downloaded. Exits with 2 where the
    script fails, after its message.
    """
    for name in parse_mixture(dataset):
        script = ROOT / "prepare" / f"{name}.py"
        if (DATA / name / "meta.json").exists() or not script.exists():
            continue  # open_dataset() has the message for a dataset without a script
        print(f"preparing the dataset: python prepare/{name}.py", flush=True)
        status = subprocess.run([sys.executable, str(script)]).returncode
        if status == TextMissing.status and fallback:
            print(f"{name} is not available here: training on {fallback}, which needs no network", flush=True)
            return ensure_dataset(fallback)
        if status:
            raise SystemExit(2)
    return dataset


def make_tokenizer(kind: str, vocab_size: int, source: Source, sample: int, workers: int | None = None) -> Tokenizer:
    """char reads the whole corpus, bpe the first `sample` characters of its training part, byte and gpt2 nothing.

    kind may also be a folder: of a prepared dataset, whose tokenizer is taken, or of GPT-2's files.
    """
    if kind == "byte":
        return tokenizers.byte_tokenizer()
    if kind == "gpt2":
        return tokenizers.gpt2_tokenizer()
    if kind == "char":
        characters: set[str] = set()
        for piece in (piece for batch, _ in source(None) for piece in batch):
            characters.update(piece.text, "\n" * piece.last)  # type: ignore[arg-type]
        return tokenizers.char_tokenizer("".join(characters))
    if kind == "bpe":
        tokenizer = tokenizers.train_bpe(_training_text(source, sample), vocab_size, workers)
        if tokenizer.vocab_size < vocab_size:
            print(f"the text is too small for a vocabulary of {vocab_size:,} ids: using {tokenizer.vocab_size:,}")
        return tokenizer
    if (Path(kind) / "merges.txt").exists():
        return tokenizers.gpt2_tokenizer(Path(kind))
    if (Path(kind) / "meta.json").exists():
        return tokenizers.from_json(open_dataset(kind)["tokenizer"])
    raise UserError(f"--tokenizer={kind} is none of {', '.join(tokenizers.KINDS)}, nor the folder of a dataset")


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
    """Prepares data_dir/name from a source and prints a report. Returns the folder.

    max_tokens: the size of the training split, where the corpus has as many; the validation split then has a ninth of
    it at most. 0: the whole corpus. workers: processes, 0 for one per CPU. settings: what distinguishes this corpus
    from others, with `input`, the path of its text, if it has one. A killed preparation continues where the settings
    are the same, without a lost or doubled document.
    """
    folder = Path(data_dir or DATA) / name
    wanted = {"tokenizer": tokenizer, "vocab_size": vocab_size, "max_tokens": max_tokens, **(settings or {})}
    text = Path(wanted["input"]) if wanted.get("input") else None
    if text:
        wanted["fingerprint"] = fingerprint(text)
    _refuse_foreign(folder)
    with run_lock(folder):
        progress = _read_progress(folder, wanted)
        if progress is None:
            sample = min(BPE_SAMPLE, 5 * max_tokens or BPE_SAMPLE)
            saved = make_tokenizer(tokenizer, vocab_size, source, sample, workers or None).to_json()
            progress = {"settings": wanted, "tokenizer": saved, "source": None, "finished": False, "end_letters": 0}
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
        meta = {"dataset": name, "input": shown_input(text) if text else "", "tokenizer": progress["tokenizer"]}
        meta |= {"splits": splits}
        _print_replaced(folder, meta)
        publish(folder, meta)
        (folder / "progress.json").unlink(missing_ok=True)
        meta["report"] = report(folder)
        meta["report"] |= {"end_letters": progress.get("end_letters", 0), "skipped": skipped_rows(progress["source"])}
        publish(folder, meta)
    print_report(folder)
    return folder


def _print_replaced(folder: Path, meta: dict[str, Any]) -> None:
    """Prints which dataset in this folder is replaced, if it has other ids or another tokenizer."""
    with suppress(UserError, ValueError):  # there is none, or it is damaged; a text on another drive
        old = open_dataset(folder)
        if old["fingerprint"] != dataset_fingerprint(meta):
            made_from = old.get("input") or "a text that it does not name"
            print(f"replaces the dataset made from {made_from}: {folder}", flush=True)


def shown_input(text: Path) -> str:
    """What meta.json says of a corpus: its path as it was typed, or its name and folder, but never a home folder."""
    if not text.is_absolute() and ".." not in text.parts:
        return text.as_posix()
    folder = text.resolve().parent
    return text.name if folder.parent == Path.home().parent else f"{folder.name}/{text.name}"


def _refuse_foreign(folder: Path) -> None:
    """Raises UserError where a file there has the name of one of ours, and another program wrote it."""
    with suppress(OSError):
        if b'"format": "minutegpt"' not in (folder / "meta.json").read_bytes()[:4096]:
            raise UserError(
                f"{folder / 'meta.json'} is not from this project, and would be replaced. Write elsewhere: "
                "--dataset=NAME or --data_dir=FOLDER; or move that file away"
            )


def _write_shards(
    folder: Path, source: Source, progress: dict[str, Any], max_tokens: int, workers: int | None, shard_tokens: int
) -> None:
    """Encodes the rest of the source into shards, and updates `progress`, which names them."""
    splits, vocab_size = progress["splits"], progress["tokenizer"]["vocab_size"]
    tokenizer = tokenizers.from_json(progress["tokenizer"])
    writers = {split: ShardWriter(folder, split, vocab_size, shard_tokens, splits[split]["writer"]) for split in splits}
    limits = {"train": max_tokens, "val": -(-max_tokens // 9)} if max_tokens else {}

    def is_full(split: str) -> bool:
        return bool(limits) and writers[split].tokens >= limits[split]

    def sync(finished: bool) -> None:
        for split, writer in writers.items():
            if finished:
                writer.close()
            splits[split]["writer"] = writer.sync()
        progress["finished"] = finished
        if progress["source"] is not None:
            with atomic_write(folder / "progress.json") as file:
                file.write(json.dumps(progress).encode())

    def needed() -> Iterator[tuple[list[Piece], Any]]:
        """The batches up to both limits, without the pieces of a split that is full."""
        for pieces, state in source(progress["source"]):
            interleaved = writers["val"].tokens and any(piece.split == "train" for piece in pieces)
            if is_full("train") and (is_full("val") or interleaved):
                return  # where validation comes after all of training, it is read to its limit
            yield [piece for piece in pieces if not is_full(piece.split)], state

    encoded = ordered_map(encode_batch, needed(), workers, load_tokenizer, (progress["tokenizer"],))
    total, done, synced = max_tokens or None, writers["train"].tokens, time.monotonic()
    with tqdm(total=total, initial=done, unit=" tokens", unit_scale=True, desc=folder.name, disable=None) as bar:
        for results, progress["source"] in encoded:
            for split, encoding in results.items():
                if limits and writers[split].tokens + len(encoding.ids) > limits[split]:
                    encoding = _first_ids(encoding, limits[split] - writers[split].tokens, tokenizer)
                writers[split].write(encoding.ids)
                splits[split]["characters"] += encoding.characters
                splits[split]["bytes"] += encoding.bytes
                progress["end_letters"] = progress.get("end_letters", 0) + encoding.end_letters
                bar.update(len(encoding.ids))
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
        raise UserError(f"{path} is damaged. Delete it, which starts this preparation again") from None
    if not same:
        raise UserError(
            f"{path} belongs to a stopped preparation with other settings: {progress['settings']}. Type the same ones "
            "to continue it, or delete that file to start again"
        )
    print(f"continuing the stopped preparation of {folder.name}")
    return progress


_tokenizer: Tokenizer  # one per process


def load_tokenizer(saved: dict[str, Any]) -> None:
    global _tokenizer
    _tokenizer = tokenizers.from_json(saved)


class Encoding(NamedTuple):
    """Ids (N,), what they stand for, and how often the text has the letters <|endoftext|>."""

    ids: np.ndarray
    characters: int
    bytes: int
    end_letters: int


def encode_batch(batch: tuple[list[Piece], Any]) -> tuple[dict[str, Encoding], Any]:
    """A batch -> the Encoding of each split, and the batch's state."""
    pieces, state = batch
    parts: dict[str, list[Encoding]] = {}
    for piece in pieces:
        parts.setdefault(piece.split, []).append(_encode_piece(piece))
    smallest = np.uint16 if _tokenizer.vocab_size <= 1 << 16 else np.uint32  # what travels between processes
    encoded = {}
    for split, encodings in parts.items():
        ids, *counts = zip(*encodings, strict=True)
        encoded[split] = Encoding(np.concatenate(ids).astype(smallest), *map(sum, counts))
    return encoded, state


def _encode_piece(piece: Piece) -> Encoding:
    text, end_letters = piece.text, 0
    if isinstance(text, np.ndarray):
        if text.max() >= _tokenizer.vocab_size:
            raise UserError(
                f"id {text.max()} is outside a vocabulary of {_tokenizer.vocab_size}. Name the tokenizer that made the "
                "ids: --tokenizer=NAME"
            )
        ids, size = text, int(_tokenizer.token_bytes()[text].sum())
    elif isinstance(text, bytes):
        ids, size = _tokenizer.encode_bytes(text), len(text)
        end_letters = text.count(END.encode())
    else:
        end_letters = text.count(END)
        text += "\n" * (piece.last and _tokenizer.end_token is None)
        ids = _tokenizer.encode_array(text)
        size = len(text) if text.isascii() else len(text.encode())
    if piece.last and _tokenizer.end_token is not None:
        ids = np.append(ids, np.uint32(_tokenizer.end_token))
    return Encoding(ids, len(text), size, end_letters)


def _first_ids(encoding: Encoding, n: int, tokenizer: Tokenizer) -> Encoding:
    """The first n ids, and the text that they stand for."""
    ids = encoding.ids[:n]
    text = tokenizer.decode(ids[ids != tokenizer.end_token] if tokenizer.end_token is not None else ids)
    return Encoding(ids, len(text), int(tokenizer.token_bytes()[ids].sum()), encoding.end_letters)


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
    report, vocab_size, kind = meta["report"], meta["tokenizer"]["vocab_size"], meta["tokenizer"]["kind"]
    train, val = meta["splits"]["train"], meta["splits"]["val"]
    for name, split in meta["splits"].items():
        print(f"{name:5} {split['characters']:>15,} characters {split['tokens']:>15,} tokens")
    print(f"{kind} vocabulary of {vocab_size:,} ids, {report['coverage']:.1%} of them in the training text")
    print(f"{report['bytes_per_token']:.2f} bytes per token, {report['tokens_per_id']:,.0f} training tokens per id")
    print(
        f"{report['bigrams']:,} of {vocab_size**2:,} bigrams occur ({report['bigrams_share']:.2%}), each "
        f"{report['bigram_mean_count']:,.1f} times on average"
    )
    print(f"the embedding is {report['embedding_share']:.1%} of the default model's parameters")
    if report.get("skipped"):
        print(f"skipped {report['skipped']:,} rows without a text")
    if report.get("end_letters"):
        print(
            f"warning: the text holds the letters {END}, {report['end_letters']:,} times, as a file of joined "
            "documents does. They are encoded as letters. To make each document end there: --split_documents"
        )
    if val["tokens"] > train["tokens"]:
        print("warning: the validation split is larger than the training split. Add more documents")
    if report["tokens_per_id"] < FEW_TOKENS_PER_ID and kind != "char":
        fitting = max(256, train["tokens"] // FEW_TOKENS_PER_ID)
        print(
            f"warning: the vocabulary is large for this text, most ids are too rare to learn. Take about {fitting:,} "
            "ids (--tokenizer=bpe --vocab_size=N), or --tokenizer=char"
        )
    where = "" if folder.parent.resolve() == DATA.resolve() else f"MINUTEGPT_DATA={shlex.quote(str(folder.parent))} "
    print(f"written to {folder}. Train on it: {where}python train.py --dataset={shlex.quote(folder.name)}")
