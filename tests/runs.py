"""Real runs of train.py for the tests, in a copy of the house with a small dataset of its own.

Each run is a process of its own that can be killed, forked from one that has imported torch already: half a second
a run instead of eight.

    with House(folder) as house:
        assert house.train("--max_iters=4", out="a").wait() == 0
"""

import json
import os
import random
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TINY = {
    "dataset": "words", "device": "cpu", "compile": "false", "dtype": "float32", "n_layer": 2, "n_head": 2,
    "n_embd": 32, "block_size": 32, "batch_size": 4, "gradient_accumulation_steps": 2, "dropout": 0.2,
    "max_iters": 40, "eval_interval": 5, "eval_iters": 2, "log_interval": 1, "warmup_iters": 5,
    "checkpoint_minutes": 0,
}  # fmt: skip


def words(n: int, seed: int = 0) -> str:
    """n characters of a language with 40 words."""
    rng = random.Random(seed)
    known = ["".join(rng.choices("abcdefghij", k=rng.randint(1, 7))) for _ in range(40)]
    return " ".join(rng.choices(known, k=n))[: n - 1] + "\n"


def tiny(**knobs: object) -> list[str]:
    return [f"--{key}={value}" for key, value in (TINY | knobs).items()]


def start_ranks(house: "House", n: int, *argv: str) -> list["Run"]:
    """n processes of train.py as torchrun starts them, over gloo."""
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(n)}
    return [
        house.run("train.py", *argv, env=env | {"LOCAL_WORLD_SIZE": str(n), "RANK": str(i), "LOCAL_RANK": str(i)})
        for i in range(n)
    ]


def ranks(house: "House", n: int, *argv: str) -> str:
    """Runs n processes to their good end; what the first one wrote, for the others must write nothing."""
    runs = start_ranks(house, n, *argv)
    assert [run.wait() for run in runs] == [0] * n, "\n".join(run.output for run in runs)
    assert not any(run.output for run in runs[1:]), "\n".join(run.output for run in runs[1:])
    return runs[0].output


def losses(folder: Path) -> dict[int, float]:
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return {row["step"]: row["train_loss"] for row in log if row["train_loss"] is not None}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class House:
    """A copy of the repository with the dataset `words`, and the process that runs are forked from."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(ROOT / "minutegpt", folder / "minutegpt", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(ROOT / "prepare", folder / "prepare", ignore=shutil.ignore_patterns("__pycache__"))
        for script in ("model.py", "train.py", "sample.py", "evaluate.py"):
            shutil.copy(ROOT / script, folder)
        (folder / "words.txt").write_text(words(20_000), encoding="utf-8")
        subprocess.run(
            [sys.executable, "prepare/text.py", "--input=words.txt"], cwd=folder, check=True, capture_output=True
        )

    def __enter__(self) -> "House":
        self.nursery = subprocess.Popen(
            [sys.executable, __file__], cwd=self.folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        )  # fmt: skip
        assert self.nursery.stdout and self.nursery.stdout.readline() == "ready\n"
        return self

    def __exit__(self, *error: object) -> None:
        assert self.nursery.stdin
        self.nursery.stdin.close()
        self.nursery.wait()

    def ask(self, **request: Any) -> Any:
        assert self.nursery.stdin and self.nursery.stdout
        print(json.dumps(request), file=self.nursery.stdin, flush=True)
        return json.loads(self.nursery.stdout.readline())

    def run(self, script: str, *argv: str, env: Mapping[str, str] | None = None, log: Path | None = None,
            **limits: int) -> "Run":  # fmt: skip
        """Starts `python script argv...` in the house; limits are those of the resource module: RLIMIT_FSIZE=1000."""
        log = log or self.folder / f"{time.monotonic_ns()}.txt"
        log.touch()
        return Run(self, self.ask(script=script, argv=argv, log=str(log), env=dict(env or {}), limits=limits), log)

    def train(self, *argv: str, out: str, **knobs: Any) -> "Run":
        """Starts a tiny run from scratch in out; knobs go over TINY."""
        tiny = [f"--{key}={value}" for key, value in (TINY | knobs).items()]
        return self.run("train.py", f"--out_dir={out}", *tiny, *argv)

    def resume(self, *argv: str, out: str) -> "Run":
        return self.run("train.py", "--init_from=resume", f"--out_dir={out}", *argv)


class Run:
    """A process; `output` is what it wrote so far, on both streams."""

    def __init__(self, house: House, pid: int, log: Path) -> None:
        self.house, self.pid, self.log = house, pid, log
        self.status: int | None = None

    @property
    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait(self, seconds: float = 600.0) -> int:
        """The exit status, negative where a signal ended it."""
        if self.status is None:
            self.status = self.house.ask(wait=self.pid, seconds=seconds)
        return self.status

    def alive(self) -> bool:
        return self.house.ask(alive=self.pid)

    def send(self, signum: int) -> None:
        os.kill(self.pid, signum)

    def await_output(self, text: str, seconds: float = 300.0) -> None:
        end = time.monotonic() + seconds
        while text not in self.output:
            assert time.monotonic() < end, f"{text!r} never came:\n{self.output}"
            time.sleep(0.01)


def serve() -> None:
    """The process that runs are forked from: one request a line on standard input, one answer a line."""
    sys.path[0] = os.getcwd()
    sys.argv = [os.path.abspath("train.py")]  # whose hook for a user's mistake minutegpt.errors then installs
    import matplotlib.pyplot  # noqa: F401
    import torch._dynamo  # noqa: F401  what every optimizer imports

    import minutegpt.checkpoint
    import minutegpt.device
    import minutegpt.errors
    import minutegpt.plot

    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            print(json.dumps(_wait(request["wait"], request["seconds"])), flush=True)
            continue
        if "alive" in request:
            ended = os.waitid(os.P_PID, request["alive"], os.WEXITED | os.WNOHANG | os.WNOWAIT)
            print(json.dumps(ended is None), flush=True)
            continue
        child = os.fork()
        if not child:
            minutegpt.errors.STARTED = time.perf_counter()
            _become(request)
        print(child, flush=True)


def _wait(pid: int, seconds: float) -> int | str:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return f"still running after {seconds} seconds"


def _become(request: dict[str, Any]) -> None:
    """This fork is `python script argv...` from here on."""
    import resource  # not on Windows

    log = os.open(request["log"], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    empty = os.open(os.devnull, os.O_RDONLY)
    for stream, descriptor in enumerate((empty, log, log)):
        os.dup2(descriptor, stream)
    os.setsid()
    os.environ.update(request["env"])
    for name, limit in request["limits"].items():
        resource.setrlimit(getattr(resource, name), (limit, limit))
    sys.argv = [request["script"], *request["argv"]]
    status: Any = 0
    try:
        try:
            runpy.run_path(os.path.abspath(request["script"]), run_name="__main__")
        except Exception:
            sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
            status = 1
    except SystemExit as end:
        status = end.code or 0
        if isinstance(status, str):
            print(status, file=sys.stderr)
            status = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    serve()
