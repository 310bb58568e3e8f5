"""Where texts come from: found on this machine first, then downloaded."""

import hashlib
import os
import time
import urllib.error
import urllib.request
from pathlib import Path

from minutegpt.errors import ROOT, UserError
from minutegpt.files import atomic_write

TINY_SHAKESPEARE = (
    "tinyshakespeare.txt",
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
)
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
GPT2_FILES = (
    ("encoder.json", GPT2_URL + "encoder.json", "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"),
    ("vocab.bpe", GPT2_URL + "vocab.bpe", "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"),
)


class TextMissing(UserError):
    """A text that is not on this machine and cannot be had from the network; the scripts exit with 3."""

    status = 3


def caches() -> list[Path]:
    """Folders that hold texts, in the order they are searched; the last one is this user's own."""
    named = os.environ.get("MINUTEGPT_CACHE")
    if named:
        return [Path(named)]
    shared = ROOT.parent / "shared" / "data"  # as a class or a lab has it
    return [shared] * shared.is_dir() + [Path.home() / ".cache" / "minutegpt"]


def own_cache() -> Path:
    """Where a new text is put."""
    return next((folder for folder in caches() if os.access(folder, os.W_OK)), caches()[-1])


def find_text(name: str, url: str, sha256: str, given: str = "") -> Path:
    """The file `given`, else `name` in one of the caches, else downloaded from `url` into one.

    Raises TextMissing, which tells the three ways out, where none of these has it.
    """
    if given:
        if not Path(given).is_file():
            raise UserError(f"--input={given}: there is no such file")
        return Path(given)
    for folder in caches():
        path = folder / name
        if path.is_file():
            if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
                raise UserError(f"{path} is not the text that it should be (its sha256 differs): delete or replace it")
            return path
    try:
        content = download_bytes(url, sha256)
    except OSError as error:
        raise TextMissing(
            f"{name} is not on this machine and cannot be downloaded ({error}). Three ways out: put the file at "
            f"{own_cache() / name}; name it with --input=FILE after python prepare/{{shakespeare_char,text}}.py; or "
            "take the dataset that needs no network: python train.py config/python_code.py"
        ) from None
    path = own_cache() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, len(content)) as file:
        file.write(content)
    return path


def download_bytes(url: str, sha256: str, tries: int = 3, timeout: float = 20.0) -> bytes:
    """The bytes at a URL, tried again after a failure. Raises OSError where they cannot be had, or are others."""
    for attempt in range(tries):
        try:
            with urllib.request.urlopen(url, timeout=timeout) as response:
                content = response.read()
            if hashlib.sha256(content).hexdigest() == sha256:
                return content
            failure = OSError(f"{url} gave {len(content):,} bytes with another sha256 than expected")
        except urllib.error.HTTPError as error:
            failure = OSError(f"{url} answered {error.code} {error.reason}")
            if error.code < 500:  # asking again changes nothing
                break
        except (OSError, urllib.error.URLError) as error:
            failure = OSError(f"{url}: {getattr(error, 'reason', error)}")
        except Exception as error:  # http.client: cut off in the middle, or no HTTP at all
            failure = OSError(f"{url}: {type(error).__name__}")
        if attempt < tries - 1:
            time.sleep(2**attempt)
    raise failure


def find_gpt2(folder: Path | None = None) -> tuple[Path, Path]:
    """Vocabulary and merges of GPT-2: vocab.json and merges.txt, or encoder.json and vocab.bpe, or downloaded."""
    for place in [folder] if folder else [place / sub for place in caches() for sub in ("gpt2", "")]:
        for names in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
            if all((place / name).is_file() for name in names):
                return place / names[0], place / names[1]
    try:
        if folder:
            raise TextMissing(f"{folder} has no vocab.json and merges.txt")
        vocab, merges = (find_text(*file) for file in GPT2_FILES)
        return vocab, merges
    except TextMissing:
        raise TextMissing(
            "GPT-2's vocabulary is not on this machine and cannot be downloaded: put vocab.json and merges.txt (from "
            f"any copy of GPT-2) into {own_cache() / 'gpt2'}, or take --tokenizer=bpe, trained on your own text"
        ) from None
