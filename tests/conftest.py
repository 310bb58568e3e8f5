"""Fixtures that test files share: small data that needs no network, and a folder to run scripts in."""

import os
import shutil
import signal
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: tests run side by side

for name in ("SIGINT", "SIGHUP"):  # nohup and a shell's & have them ignored, by the scripts that the tests start too
    if signal.getsignal(getattr(signal, name, signal.SIGINT)) == signal.SIG_IGN:
        signal.signal(getattr(signal, name, signal.SIGINT), signal.SIG_DFL)

pytest.register_assert_rewrite("harness")


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A folder of datasets with one called small, by character."""
    from harness import make_dataset, small_text

    from minutegpt.data.tokenizer import char_tokenizer

    folder, text = tmp_path_factory.mktemp("data"), small_text()
    end = len(text) * 9 // 10
    make_dataset(folder / "small", char_tokenizer(text), text[:end], text[end:])
    return folder


@pytest.fixture(scope="module")
def house(tmp_path_factory, data) -> Path:
    """A folder to run scripts in, whose data/ has the dataset small."""
    folder = tmp_path_factory.mktemp("house")
    shutil.copytree(data / "small", folder / "data" / "small")
    return folder


@pytest.fixture(scope="session")
def shakespeare() -> str:
    """Tiny Shakespeare, where there is a copy. CI sets MINUTEGPT_NO_SKIP: there, none is a failure."""
    from minutegpt.data.download import TINY_SHAKESPEARE, caches

    for folder in caches():
        path = folder / TINY_SHAKESPEARE[0]
        if path.exists():
            return path.read_text(encoding="utf-8")
    if os.environ.get("MINUTEGPT_NO_SKIP"):
        pytest.fail("no copy of Tiny Shakespeare, and MINUTEGPT_NO_SKIP is set")
    pytest.skip("no copy of Tiny Shakespeare on this machine")


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """Scripts find no network, and an empty folder, which is returned, where a cache of the hub and texts would be."""
    empty = str(tmp_path_factory.mktemp("empty"))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"HF_HUB_OFFLINE": "1", "HF_HOME": empty, "MINUTEGPT_CACHE": empty}.items():
            patch.setenv(name, value)
        yield empty
