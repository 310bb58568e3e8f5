"""Starts scripts as a user starts them, and makes the small models, texts and datasets that tests share.

    done = run("sample.py", "--out_dir=x", stdin="ROMEO:", cwd=folder)  # to its end
    assert done.status == 0 and done.out.startswith("ROMEO:"), done.err

    training = start("train.py", *tiny(max_iters=10_000), "--out_dir=x", cwd=folder)  # at the same time as the test
    training.await_output("step 3/")
    training.send(signal.SIGINT)
    assert training.wait() == 130

A script is forked from a process that has imported torch: half a second instead of eight. That process imports
nothing of this repository, so that a script from a changed copy runs the code of its copy.
"""

import atexit
import functools
import inspect
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from minutegpt.checkpoint import read_checkpoint, save
from minutegpt.data.shards import ShardWriter, publish
from minutegpt.errors import UserError
from minutegpt.optim import make_optimizers
from model import GPTConfig

ROOT = Path(__file__).resolve().parent.parent
CAN_FORK = hasattr(os, "fork") and hasattr(socket, "send_fds")
TINY = GPTConfig(block_size=12, vocab_size=17, n_layer=2, n_head=4, n_embd=16)
TINY_RUN = {
    "dataset": "small", "device": "cpu", "compile": "false", "dtype": "float32", "n_layer": 2, "n_head": 2,
    "n_embd": 32, "block_size": 32, "batch_size": 4, "gradient_accumulation_steps": 2, "dropout": 0.2,
    "max_iters": 40, "eval_interval": 5, "eval_iters": 2, "log_interval": 1, "warmup_iters": 5,
    "checkpoint_minutes": 0,
}  # fmt: skip
posix = pytest.mark.skipif(os.name == "nt", reason="POSIX only")
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


# ---------------------------------------------------------------------------------------- scripts


def tiny(**settings: object) -> list[str]:
    """The command line of a training run that takes a second; settings replace those of TINY_RUN."""
    return [f"--{key}={value}" for key, value in (TINY_RUN | settings).items()]


class Run:
    """A script that was started. `out` and `err` are what it wrote so far, `output` is both."""

    def __init__(self, name: str, process: "subprocess.Popen[bytes] | _Fork", files: dict[str, Path]) -> None:
        self.name, self.process, self.files, self.pid = name, process, files, process.pid

    @property
    def status(self) -> int | None:
        """The exit status, negative where a signal ended it; None while it runs."""
        return self.process.poll()

    def alive(self) -> bool:
        return self.status is None

    @property
    def out(self) -> str:
        return self._read("out")

    @property
    def err(self) -> str:
        return self._read("err")

    @property
    def output(self) -> str:
        return self.out + self.err

    def _read(self, stream: str) -> str:
        if stream not in self.files:  # it goes to a descriptor of the test
            return ""
        return self.files[stream].read_bytes().decode("utf-8", "replace").replace(os.linesep, "\n")

    def send(self, signum: int) -> None:
        self.process.send_signal(signum)

    def wait(self, seconds: float = 300.0) -> int:
        """The exit status. Kills a script that takes longer, and raises TimeoutError."""
        end, pause = time.monotonic() + seconds, 0.001
        while (status := self.status) is None:
            if time.monotonic() > end:
                self.send(getattr(signal, "SIGKILL", signal.SIGTERM))
                raise TimeoutError(f"{self.name} still runs after {seconds} seconds:\n{self.output}")
            time.sleep(pause)
            pause = min(2 * pause, 0.02)
        return status

    def await_output(self, text: str, seconds: float = 300.0) -> None:
        end = time.monotonic() + seconds
        while text not in self.output:
            assert self.alive() or text in self.output, f"{self.name} ended without {text!r}:\n{self.output}"
            assert time.monotonic() < end, f"{self.name} does not print {text!r}:\n{self.output}"
            time.sleep(0.005)


def run(script: str | Path, *argv: str, seconds: float = 300.0, **how: Any) -> Run:
    """Runs a script to its end; `how` is that of start()."""
    done = start(script, *argv, **how)
    done.wait(seconds)
    return done


def start(
    script: str | Path,
    *argv: str,
    cwd: Path = ROOT,
    data: Path | None = None,
    env: Mapping[str, str] | None = None,
    stdin: str | bytes | int = b"",
    stdout: int | None = None,
    stderr: int | None = None,
    limits: Mapping[str, int] | None = None,
    torchrun: Sequence[str] = (),
    fork: bool = CAN_FORK,
) -> Run:
    """Starts `python script argv...` in the folder cwd; a relative script is one of this repository.

    data: the folder of datasets, cwd/data by default. stdin: what it reads, or a descriptor, as stdout and stderr.
    limits: of the module resource, as {"RLIMIT_FSIZE": 1000}. torchrun: the options of torchrun, which then starts
    the script. fork=False and torchrun start a Python of their own.
    """
    command = [str(ROOT / script), *argv]
    base = {"OMP_NUM_THREADS": "1", "PYTHONUTF8": "1", "MINUTEGPT_DATA": str(data or cwd / "data")}
    environ = {**os.environ, **base, **(env or {})}
    with _streams(stdin, stdout, stderr) as (descriptors, files):
        process: subprocess.Popen[bytes] | _Fork
        if fork and not torchrun:
            request = {"argv": command, "cwd": str(cwd), "env": environ, "limits": dict(limits or {})}
            process = _Fork(request, descriptors)
        else:
            assert not limits, "limits need a fork"
            launcher = ["-m", "torch.distributed.run", *torchrun] if torchrun else []
            command = [sys.executable, *launcher, *command]
            process = subprocess.Popen(
                command, cwd=cwd, env=environ, stdin=descriptors[0], stdout=descriptors[1], stderr=descriptors[2]
            )
    return Run(f"{Path(script).name} {' '.join(argv)}", process, files)


def refused(done: Run, *words: str, status: int = 2) -> str:
    """Checks that a script ended with a user's error: the exit status, one message with these words, no traceback."""
    assert done.status == status, done.output
    assert "Traceback" not in done.output, done.output
    assert "error: " in done.err, done.output
    for word in words:
        assert word in done.err, done.err
    return done.err


def train(folder: Path, out: str, *argv: str, **settings: object) -> Run:
    """Starts a tiny training run in folder, which has the dataset."""
    return start("train.py", f"--out_dir={out}", *tiny(**settings), *argv, cwd=folder)


def resume(folder: Path, out: str, *argv: str) -> Run:
    return start("train.py", "--init_from=resume", f"--out_dir={out}", *argv, cwd=folder)


def start_ranks(folder: Path, n: int, *argv: str, script: str | Path = "train.py") -> list[Run]:
    """Starts n processes of train.py, or of a script that changes it, as torchrun does, over gloo."""
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    world |= {"WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n)}
    envs = [world | {"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(n)]
    return [start(script, *argv, cwd=folder, env=env) for env in envs]


def ranks(folder: Path, n: int, *argv: str) -> str:
    """Runs n processes, which must succeed. Returns the output of the first; the others must print nothing."""
    runs = start_ranks(folder, n, *argv)
    assert [run.wait() for run in runs] == [0] * n, "\n".join(run.output for run in runs)
    assert not any(run.output for run in runs[1:]), "\n".join(run.output for run in runs[1:])
    return runs[0].output


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def losses(folder: Path) -> dict[int, float]:
    """The training loss at each step of a run."""
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return {row["step"]: row["train_loss"] for row in log if row["train_loss"] is not None}


# ---------------------------------------------------------------------------------------- the fork server


class _Fork:
    """A process of the server, with the part of subprocess.Popen that Run needs."""

    def __init__(self, request: dict[str, Any], descriptors: list[int]) -> None:
        self.pid: int = _ask(request, descriptors)
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = _ask({"poll": self.pid})
        return self.returncode

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signum)


def _ask(request: dict[str, Any], descriptors: Sequence[int] = ()) -> Any:
    socket.send_fds(_server(), [json.dumps(request).encode() + b"\n"], descriptors)
    with _server().makefile() as answers:
        return json.loads(answers.readline())


@functools.cache
def _server() -> socket.socket:
    """Starts the server, once per test process. It ends when this end of the socket is closed."""
    ours, theirs = socket.socketpair()
    # as text, so that it imports neither pytest nor this repository
    command = [sys.executable, "-c", inspect.getsource(_serve) + "_serve()"]
    process = subprocess.Popen(
        command,
        stdin=theirs.fileno(),
        stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"},
        start_new_session=True,  # Ctrl-C is for the tests to handle
    )
    theirs.close()

    def stop() -> None:
        ours.close()
        process.wait()

    atexit.register(stop)
    return ours


def _serve() -> None:
    """The process that scripts are forked from: one request per line, one answer per line."""
    import gc
    import json
    import os
    import runpy
    import signal
    import socket
    import sys

    import matplotlib.pyplot  # noqa: F401
    import numpy  # noqa: F401
    import regex  # noqa: F401
    import safetensors.torch  # noqa: F401
    import tiktoken  # noqa: F401
    import torch._dynamo  # noqa: F401  every optimizer imports it
    import tqdm  # noqa: F401

    gc.freeze()  # a fork does not copy these objects to look at them
    channel = socket.socket(fileno=0)
    children: set[int] = set()
    while True:
        line, descriptors, *_ = socket.recv_fds(channel, 2**20, 3)
        while line and not line.endswith(b"\n"):
            line += channel.recv(2**20)
        if not line:  # the tests are over
            for child in children:
                os.kill(child, signal.SIGKILL)
            return
        request = json.loads(line)
        if "poll" in request:
            child, status = os.waitpid(request["poll"], os.WNOHANG)
            children.discard(child)
            answer = os.waitstatus_to_exitcode(status) if child else None
            channel.sendall(json.dumps(answer).encode() + b"\n")
            continue
        child = os.fork()
        if not child:
            break
        for descriptor in descriptors:
            os.close(descriptor)
        children.add(child)
        channel.sendall(b"%d\n" % child)
    # from here on, this fork is `python script argv...`
    channel.detach()
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdout.reconfigure(line_buffering=sys.stdout.isatty())  # type: ignore[union-attr]
    os.setsid()
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.argv = request["argv"]
    sys.path[:1] = [os.path.dirname(sys.argv[0]), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    for name, limit in request["limits"].items():
        import resource

        resource.setrlimit(getattr(resource, name), (limit, limit))
    status = 0
    try:
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit:
            raise
        except BaseException:
            status = 1
            sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)  # without the half second that torch takes to end


@functools.cache
def _stream_folder() -> "tempfile.TemporaryDirectory[str]":
    return tempfile.TemporaryDirectory(prefix="minutegpt-streams-")


@contextmanager
def _streams(
    stdin: str | bytes | int, stdout: int | None, stderr: int | None
) -> Iterator[tuple[list[int], dict[str, Path]]]:
    """The three descriptors of a script, and the files of those that the test does not have itself."""
    given = {"in": stdin if isinstance(stdin, int) else None, "out": stdout, "err": stderr}
    folder = Path(tempfile.mkdtemp(dir=_stream_folder().name))
    files = {name: folder / name for name, descriptor in given.items() if descriptor is None}
    for path in files.values():
        path.write_bytes(b"")
    if not isinstance(stdin, int):
        files["in"].write_bytes(stdin.encode() if isinstance(stdin, str) else stdin)
    opened = {name: os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0)) for name, path in files.items()}
    try:
        yield [opened[name] if descriptor is None else descriptor for name, descriptor in given.items()], files
    finally:
        for descriptor in opened.values():
            os.close(descriptor)


# ---------------------------------------------------------------------------------------- data and models


def small_text() -> str:
    """About 9,000 characters with patterns to learn, the same on every machine."""
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "then", "sleeps"]
    chance = random.Random(0)
    return "".join(" ".join(chance.choices(words, k=8)).capitalize() + ".\n" for _ in range(220))


def make_dataset(folder: Path, tokenizer: Any, train: str, val: str) -> None:
    """A prepared dataset of these two texts."""
    folder.mkdir(parents=True)
    splits = {}
    for split, text in (("train", train), ("val", val)):
        ids = tokenizer.encode_array(text)
        writer = ShardWriter(folder, split, tokenizer.vocab_size)
        writer.write(ids)
        splits[split] = {"tokens": len(ids), "bytes": len(text.encode()), "shards": writer.close()}
    publish(folder, {"dataset": folder.name, "tokenizer": tokenizer.to_json(), "splits": splits, "report": {}})


def make_run(folder: Path, model: Any, tokenizer: Any, text: list[int], dataset: str, steps: int = 150) -> None:
    """A run's folder, whose model has memorised this text, in token ids."""
    ids = torch.tensor(text)
    T = model.config.block_size
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    random = torch.Generator().manual_seed(0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / steps)
        starts = torch.randint(len(ids) - T, (16,), generator=random)
        x = torch.stack([ids[i : i + T + 1] for i in starts])
        loss = model(x[:, :-1], x[:, 1:])[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    state = {
        "model": model.state_dict(), "model_config": asdict(model.config), "step": steps,
        "config": {"dataset": dataset}, "tokenizer": tokenizer.to_json(),
    }  # fmt: skip
    folder.mkdir(parents=True)
    save(folder, state, best=True)


def optimizers_of(model, optimizer: str = "adamw", dtype=None, **changes):
    """make_optimizers with the defaults of train.py."""
    settings: dict = {"learning_rate": 1e-3, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "muon_lr": 0.02}
    settings |= {"muon_weight_decay": 0.0, "ngram_weight_decay": 5.0, "optimizer": optimizer}
    return make_optimizers(model, settings | changes, dtype or torch.float32)


def copy_of_repo(folder: Path) -> Path:
    """Copies the repository, without its tests, into folder, for a test that changes it."""
    for name in ("minutegpt", "prepare", "config", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for pattern in ("*.py", "*.md", "*.toml", "*.ipynb"):
        for path in ROOT.glob(pattern):
            shutil.copy(path, folder)
    return folder


# ---------------------------------------------------------------------------------------- forks of the test itself


def in_a_fork(body: Callable[[], int | None]) -> int:
    """Calls body in a copy of this process. Returns its status: 2 after a UserError, 8 after any other error."""
    child = os.fork()
    if not child:
        torch.set_num_threads(1)  # the parent's threads are not in a fork, and new ones would take address space
        status = 8
        try:
            status = body() or 0
        except UserError:
            status = 2
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def virtual_memory() -> int:
    """The most bytes of address space that this process has had, with those it allocated and never touched."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmPeak"))


def harmless(
    path: Any, reader: Callable[[Any], Any] = read_checkpoint, seconds: int = 20, memory: float = 400e6
) -> bool:
    """Whether a hostile file is refused with a UserError, in little time and memory."""

    def body() -> int:
        before = virtual_memory()
        signal.alarm(seconds)
        try:
            reader(path)
        except UserError as error:
            return 2 if str(error) and virtual_memory() - before < memory else 3
        return 4

    return in_a_fork(body) == 2
