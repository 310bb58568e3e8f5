"""Fixtures that test files share: small data that needs no network, and a folder to run scripts in."""

import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: tests run side by side

for name in ("SIGINT", "SIGHUP"):  # nohup and a shell's & have them ignored, by the scripts that the tests start too
    if signal.getsignal(getattr(signal, name, signal.SIGINT)) == signal.SIG_IGN:
        signal.signal(getattr(signal, name, signal.SIGINT), signal.SIG_DFL)

pytest.register_assert_rewrite("harness")
ROOT = Path(__file__).resolve().parent.parent
# a model and a run that take a second: for every script test
TINY = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=32", "--batch_size=4", "--eval_iters=2",
        "--device=cpu", "--dtype=float32", "--compile=false", "--log_interval=1", "--checkpoint_minutes=0"]  # fmt: skip


def run(script: str, *args: str, data: Path | None = None, cwd: Path | None = None, **env: str):
    """Runs a script of the repo to its end; its exit status, standard output and standard error."""
    full = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1", **env}
    if data:
        full["MINUTEGPT_DATA"] = str(data)
    return subprocess.run(
        [sys.executable, str(ROOT / script), *args], capture_output=True, text=True, encoding="utf-8",
        env=full, cwd=cwd, timeout=300, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def refused(result, *words: str, status: int = 2) -> str:
    """Holds a run to a user's error: the exit status, one clear message with these words, no traceback."""
    assert result.returncode == status, result.stdout + result.stderr
    assert "Traceback" not in result.stderr + result.stdout
    assert "error: " in result.stderr
    for word in words:
        assert word in result.stderr, result.stderr
    return result.stderr


def optimizers_of(model, optimizer: str = "adamw", dtype=None, **changes):
    """make_optimizers with the defaults of train.py."""
    import torch

    from minutegpt.optim import make_optimizers

    settings: dict = {"learning_rate": 1e-3, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "muon_lr": 0.02}
    settings |= {"muon_weight_decay": 0.0, "ngram_weight_decay": 5.0, "optimizer": optimizer}
    return make_optimizers(model, settings | changes, dtype or torch.float32)


def small_text() -> str:
    """About 9,000 characters in which there is something to learn, the same on every machine."""
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "then", "sleeps"]
    chance = random.Random(0)
    return "".join(" ".join(chance.choices(words, k=8)).capitalize() + ".\n" for _ in range(220))


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
    shutil.copytree(data, folder / "data")
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
