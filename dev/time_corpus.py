"""Preparing 1 GB of text, next to Hugging Face's BPE trainer and tiktoken:  python dev/time_corpus.py

The text is what is installed on this machine: Python code, C headers, JSON, documentation and manual pages, each file
once. Each figure is of one run, as one takes minutes. Linux only.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import minutegpt.errors  # noqa: F401, I001  first: it finds the environment that has torch

import gzip
import os
import subprocess
import time
import zlib
from collections.abc import Iterator
from json import dumps
from typing import Any

from dev.time_tokenizers import encode_seconds, train_seconds
from minutegpt.config import configure
from minutegpt.data.shards import open_dataset
from minutegpt.data.tokenizer import from_json
from minutegpt.errors import ROOT, UserError

# ----------------------------------------------------------------------------------------------------------------
megabytes = 1000  # of text, at most
vocab_size = 32768
out_dir = "out-corpus"  # the text and the dataset that is made of it
json = False  # print one JSON object on one line
# ----------------------------------------------------------------------------------------------------------------
globals().update(configure(globals(), __file__, config_files=False)[0])
KINDS = {"py": "python", "pyi": "python", "h": "c", "hpp": "c", "cuh": "c", "c": "c", "cpp": "c", "json": "json"}
PROSE = ("txt", "md", "rst", "html", "xml", "gz")


def installed_texts() -> Iterator[tuple[str, str]]:
    """The kind and the text of each file, without those that occurred before."""
    seen, environment = set(), Path(sys.prefix)
    for top in dict.fromkeys((Path("/usr"), environment)):
        for folder, _, names in sorted(os.walk(top)):
            for name in sorted(names):
                path, suffix = Path(folder, name), name.rpartition(".")[2]
                if suffix not in (*KINDS, *PROSE) or path.is_symlink():
                    continue
                try:
                    raw = gzip.decompress(path.read_bytes()) if suffix == "gz" else path.read_bytes()
                    text = raw.decode()
                except (OSError, EOFError, ValueError, zlib.error):
                    continue
                if text and "\0" not in text and hash(text) not in seen:
                    seen.add(hash(text))
                    yield KINDS.get(suffix, "prose"), text


def memory_of(session: int) -> int:
    """The bytes that the processes of a session take together; what they share counts once."""
    total = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[3]) == session:
                lines = stat.with_name("smaps_rollup").read_text().splitlines()
                total += 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        except (OSError, IndexError):  # it has ended
            continue
    return total


def prepare_seconds(text: Path) -> dict[str, float]:
    """Seconds and the most memory of prepare/text.py."""
    argv = [
        f"--input={text}",
        "--tokenizer=bpe",
        f"--vocab_size={vocab_size}",
        "--dataset=corpus",
        f"--data_dir={text.parent}",
    ]
    began, most = time.perf_counter(), 0
    process = subprocess.Popen(
        [sys.executable, ROOT / "prepare" / "text.py", *argv], start_new_session=True, stdout=sys.stderr
    )
    while process.poll() is None:
        most = max(most, memory_of(process.pid))
        time.sleep(0.2)
    if process.returncode:
        raise UserError("prepare/text.py failed. The reason is printed above")
    return {"seconds": time.perf_counter() - began, "peak_memory_bytes": most}


if __name__ == "__main__":  # worker processes import this file, and must not run it
    documents: dict[str, list[str]] = {}
    size = 0
    for kind, text in installed_texts():
        documents.setdefault(kind, []).append(text)
        size += len(text.encode())
        if size > 1e6 * megabytes:
            break
    everything = [text for texts in documents.values() for text in texts]
    path = Path(out_dir, "corpus.txt").resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        file.writelines(everything)
    result: dict[str, Any] = {"bytes": size, "prepare": prepare_seconds(path)}
    tokenizer = from_json(open_dataset(path.parent / "corpus")["tokenizer"])
    result["encode_seconds"] = {kind: encode_seconds(texts, tokenizer, rounds=1) for kind, texts in documents.items()}
    result["bpe_seconds"] = train_seconds(everything, vocab_size, rounds=1)
    if json:
        print(dumps(result))
    else:
        print(f"{size / 1e6:.0f} MB of text; BPE of {vocab_size} ids: {result['bpe_seconds']}")
        for kind, seconds in result["encode_seconds"].items():
            print(f"encoding {kind}, {sum(map(len, documents[kind])) / 1e6:.0f} million characters: {seconds}")
        print(f"prepare/text.py: {result['prepare']}")
