"""Runs a script as its own process, with its own streams, in a tenth of the time that importing torch takes.

    with Scripts(data) as scripts:
        done = scripts.run("sample.py", "--out_dir=x", stdin="ROMEO:")
        done.status, done.out, done.err

The processes are forked from one that has imported torch already, and only that; where the system cannot fork they
are started the ordinary way.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NURSERY = """
import gc, json, os, runpy, signal, sys
import numpy, regex, tiktoken, torch, tqdm
import torch.export  # what makes a model on the meta device wait
gc.freeze()  # what the forks share stays shared
requests = open(0, closefd=False)  # not sys.stdin, which is the script's
while line := requests.readline():
    request = json.loads(line)
    child = os.fork()
    if child:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    for number, path in enumerate(request["streams"]):
        os.dup2(os.open(path, os.O_RDWR), number)
    signal.alarm(60)  # nothing here takes a second
    os.chdir(request["cwd"])
    sys.argv = request["argv"]
    sys.path[0] = os.path.dirname(sys.argv[0])
    status = 0
    try:
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except Exception:
            status = 1
            sys.excepthook(*sys.exc_info())
    except SystemExit as end:
        status = end.code or 0
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # without the half second in which torch takes itself apart
"""


@dataclass
class Done:
    status: int
    out: str
    err: str


class Scripts:
    """data: the folder of datasets. also: modules to import once for all; seconds: what a script may take at most."""

    def __init__(self, data: Path, also: str = "", seconds: int = 60) -> None:
        self.code = NURSERY.replace("import torch.export", f"import torch.export{also and ', ' + also}")
        self.code = self.code.replace("signal.alarm(60)", f"signal.alarm({seconds})")
        self.env = os.environ | {"MINUTEGPT_DATA": str(data), "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}

    def __enter__(self) -> "Scripts":
        if hasattr(os, "fork"):
            self.nursery = subprocess.Popen(
                [sys.executable, "-c", self.code],
                env=self.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
        return self

    def __exit__(self, *error: Any) -> None:
        if hasattr(os, "fork"):
            self.nursery.communicate()

    def run(self, script: str, *argv: str, stdin: str | bytes = "", cwd: Path = ROOT) -> Done:
        """Runs `python script argv...` to its end, with this text on standard input."""
        raw = stdin.encode() if isinstance(stdin, str) else stdin
        command = [str(ROOT / script), *argv]
        if not hasattr(os, "fork"):
            done = subprocess.run([sys.executable, *command], input=raw, capture_output=True, env=self.env, cwd=cwd)
            return Done(done.returncode, done.stdout.decode(), done.stderr.decode())
        assert self.nursery.stdin and self.nursery.stdout
        with tempfile.TemporaryDirectory() as folder:
            streams = [Path(folder) / name for name in ("in", "out", "err")]
            for stream in streams:
                stream.write_bytes(raw if stream.name == "in" else b"")
            request = {"streams": list(map(str, streams)), "cwd": str(cwd), "argv": command}
            print(json.dumps(request), file=self.nursery.stdin, flush=True)
            status = int(self.nursery.stdout.readline())
            return Done(status, *(stream.read_text(encoding="utf-8") for stream in streams[1:]))


def make_dataset(folder: Path, tokenizer: Any, train: str, val: str) -> None:
    """A prepared dataset of these two texts."""
    from minutegpt.data.shards import ShardWriter, publish

    folder.mkdir(parents=True)
    splits = {}
    for split, text in (("train", train), ("val", val)):
        ids = tokenizer.encode_array(text)
        writer = ShardWriter(folder, split, tokenizer.vocab_size)
        writer.write(ids)
        splits[split] = {"tokens": len(ids), "bytes": len(text.encode()), "shards": writer.close()}
    publish(folder, {"dataset": folder.name, "tokenizer": tokenizer.to_json(), "splits": splits, "report": {}})


def make_run(folder: Path, model: Any, tokenizer: Any, text: list[int], dataset: str, steps: int = 150) -> None:
    """A run's folder, whose model has learned this text, in token ids, by heart."""
    from dataclasses import asdict

    import torch

    from minutegpt.checkpoint import save

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
