"""Texts and vocabularies by name: found on this machine, or else downloaded and checked."""

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
    """A text that is not on this machine and cannot be downloaded. The scripts exit with 3."""

    status = 3


def caches() -> list[Path]:
    """Folders that may hold texts, in the order of the search. The last one belongs to this user."""
    named = os.environ.get("MINUTEGPT_CACHE")
    if named:
        return [Path(named)]
    shared = ROOT.parent / "shared" / "data"  # for a class or a lab
    return [shared] * shared.is_dir() + [Path.home() / ".cache" / "minutegpt"]


def own_cache() -> Path:
    """The folder for downloads: the first of caches() that can be written to."""
    return next((folder for folder in caches() if os.access(folder, os.W_OK)), caches()[-1])


def find_text(name: str, url: str, sha256: str, given: str = "") -> Path:
    """The file `given`, or else `name` in one of the caches, or else downloaded from `url` into one.

    Raises TextMissing, with three ways out, where there is none of these.
    """
    if given:
        if not Path(given).is_file():
            raise UserError(f"--input={given}: there is no such file")
        return Path(given)
    for folder in caches():
        path = folder / name
        if path.is_file():
            if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
                raise UserError(f"{path} is not the expected text (its sha256 differs). Delete or replace it")
            return path
    try:
        content = download_bytes(url, sha256)
    except OSError as error:
        raise TextMissing(
            f"{name} is not on this machine and cannot be downloaded ({error}). Three ways out:\n"
            f"  put the file at {own_cache() / name}\n"
            "  name it: python prepare/shakespeare_char.py --input=FILE\n"
            "  train without a download: python train.py config/python_code.py"
        ) from None
    path = own_cache() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, len(content)) as file:
        file.write(content)
    return path


def download_bytes(url: str, sha256: str, tries: int = 3, timeout: float = 20.0) -> bytes:
    """The bytes at a URL, after several tries. Raises OSError where there is no answer, or another sha256."""
    for attempt in range(tries):
        try:
            with urllib.request.urlopen(url, timeout=timeout) as response:
                content = response.read()
            if hashlib.sha256(content).hexdigest() == sha256:
                return content
            failure = OSError(f"{url} returned {len(content):,} bytes with another sha256 than expected")
        except urllib.error.HTTPError as error:
            failure = OSError(f"{url} answered {error.code} {error.reason}")
            if error.code < 500:  # another try would not help
                break
        except (OSError, urllib.error.URLError) as error:
            failure = OSError(f"{url}: {getattr(error, 'reason', error)}")
        except Exception as error:  # http.client: an incomplete answer, or no HTTP
            failure = OSError(f"{url}: {type(error).__name__}")
        if attempt < tries - 1:
            time.sleep(2**attempt)
    raise failure


def find_gpt2(folder: Path | None = None) -> tuple[Path, Path]:
    """The files of GPT-2's vocabulary and merges: vocab.json and merges.txt, or encoder.json and vocab.bpe.

    They are looked for in the folder, or else in the caches, and then downloaded.
    """
    for place in [folder] if folder else [cache / sub for cache in caches() for sub in ("gpt2", "")]:
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
            "GPT-2's vocabulary is not on this machine and cannot be downloaded. Put vocab.json and merges.txt (from "
            f"any copy of GPT-2) into {own_cache() / 'gpt2'}, or take --tokenizer=bpe, trained on your own text"
        ) from None
