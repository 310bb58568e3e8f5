"""How fast a model trains and writes, for bench.py and dev/compare.py.

model, get_batch = random_model(config, machine)
seconds = median_seconds({"a": f, "b": g}, repeats=5, device=machine.device)  # {"a": ..., "b": ...}
"""

import copy
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minutegpt.config import model_defaults
from minutegpt.data.dataset import open_data
from minutegpt.data.pipeline import ensure_dataset
from minutegpt.device import DTYPES, Machine, fast_dropout, synchronize
from minutegpt.errors import ROOT, UserError
from minutegpt.generate import compile_decode
from minutegpt.native import use_native_decoding
from minutegpt.optim import make_optimizers
from minutegpt.quantize import FORMATS, quantize_model
from model import GPT, GPTConfig

PARTS = ("data", "forward", "backward", "optimizer")  # of a training step
# these values do not change the speed
OPTIMIZER = {"learning_rate": 1e-3, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.99, "muon_lr": 0.02,
             "muon_weight_decay": 0.0, "ngram_weight_decay": 5.0}  # fmt: skip
Batch = tuple[Tensor, Tensor]  # inputs and targets, (B, T) each


def median_seconds(functions: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device) -> dict[str, float]:
    """The median seconds of each function. They alternate, A B A B, so that a stall does not affect only one."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            synchronize(device)
            start = time.perf_counter()
            function()
            synchronize(device)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def start_seconds(argv: Sequence[str], repeats: int) -> dict[str, float]:
    """Medians of the seconds of `python -c "import torch"` and of train.py until its first step, and their ratio.

    argv: config file and settings of train.py. The two alternate. Raises UserError where train.py fails.
    """
    seconds: dict[str, list[float]] = {"import_torch": [], "first_step": []}
    for _ in range(repeats):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import torch"], check=True)
        seconds["import_torch"].append(time.perf_counter() - began)
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, str(ROOT / "train.py"), *argv, f"--out_dir={folder}", "--log_interval=1"]
            began, output = time.perf_counter(), ""
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
                assert process.stdout is not None
                for line in process.stdout:
                    if re.match("step +1[ /]", line):
                        seconds["first_step"].append(time.perf_counter() - began)
                        process.kill()
                        break
                    output += line
                else:
                    raise UserError(f"train.py ended before its first step:\n{output}")
    result = {name: statistics.median(values) for name, values in seconds.items()}
    return result | {"ratio": result["first_step"] / result["import_torch"]}


def random_model(config: Mapping[str, Any], machine: Machine) -> tuple[GPT, Callable[[int], Batch]]:
    """A model with these settings and random weights, and a function that returns the batch of a step.

    config: the settings of bench.py. A vocab_size of 0 is the dataset's.
    """
    B, T = config["batch_size"], config["block_size"]
    data = open_data(ensure_dataset(config["dataset"], fallback="python_code"), "train", T)
    torch.manual_seed(1337)
    try:
        model_config = GPTConfig(
            vocab_size=config["vocab_size"] or data.meta["tokenizer"]["vocab_size"],
            **{name: config[name] for name in model_defaults(GPTConfig)},
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    if model_config.vocab_size < (needed := data.meta["tokenizer"]["vocab_size"]):
        raise UserError(f"--vocab_size={model_config.vocab_size} is below the {needed} ids of this text. Leave it out")
    model = GPT(model_config).to(machine.device)
    fast_dropout(model)

    def get_batch(step: int) -> Batch:
        tokens = data.windows(data.starts(T, 1337, np.arange(step * B, (step + 1) * B)), T + 1)  # (B, T+1)
        tokens = machine.to_device(tokens)
        return tokens[:, :-1], tokens[:, 1:].contiguous()  # as nanoGPT wants its targets

    return model, get_batch


def optimizers_of(model: GPT, optimizer: str, machine: Machine) -> list[torch.optim.Optimizer]:
    return make_optimizers(model, OPTIMIZER | {"optimizer": optimizer}, machine.matmul_dtype)


def training_step(
    model: Callable[[Tensor, Tensor], Any],
    optimizers: Sequence[torch.optim.Optimizer],
    get_batch: Callable[[], Batch],
    machine: Machine,
) -> list[float]:
    """Takes a step. Returns the seconds of its PARTS, which on a GPU are only those of starting the work."""
    times = [time.perf_counter()]
    x, y = get_batch()
    times.append(time.perf_counter())
    with machine.training():
        _, loss = model(x, y)
    times.append(time.perf_counter())
    loss.backward()
    times.append(time.perf_counter())
    parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]).item()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    times.append(time.perf_counter())
    return np.diff(times).tolist()


def decoding_formats(text: str) -> list[str]:
    """The formats in a comma-separated list. Raises UserError for an unknown one."""
    for name in (names := text.split(",")):
        if name not in (known := ("float32", "bfloat16", *FORMATS)):
            raise UserError(f"--decode_formats={name} is not one of {', '.join(known)}")
    return names


def batch_sizes(text: str) -> list[int]:
    """The batch sizes in a comma-separated list. Raises UserError for one that is no number of rows."""
    for word in (words := text.split(",")):
        if not word.isdecimal() or not int(word):
            raise UserError(f"--decode_batches={text}: {word!r} is not a number of rows. Type numbers, such as 1,32")
    return [int(word) for word in words]


def decoders(
    model: GPT, batch_size: int, formats: Sequence[str], machine: Machine
) -> Iterator[tuple[str, float, Callable[[Tensor, int], Any]]]:
    """Each way to decode batch_size rows: its name, the seconds of compiling it, and generate(idx, max_new_tokens).

    eager: PyTorch as it is. native: decode.c, for few rows. compiled: by torch.compile.
    formats: what the weights are read in. Uncompiled bfloat16 is left out where it is not the machine's own dtype: it
    would be emulated.
    """
    for name in formats:
        writer, dtype = model, DTYPES.get(name, torch.float32)
        if name in FORMATS:
            quantize_model(writer := copy.deepcopy(model), name)

        def generate(idx: Tensor, n: int, writer: GPT = writer, dtype: torch.dtype = dtype) -> Any:
            narrow = dtype == machine.dtype != torch.float32
            with machine.decoding(), torch.autocast(machine.device.type, dtype, enabled=narrow):
                return writer.generate(idx, n, top_k=200)

        if dtype in (torch.float32, machine.dtype):
            yield f"{name}_eager", 0.0, generate
        began = time.perf_counter()
        if dtype == torch.float32 and use_native_decoding(writer, batch_size):
            yield f"{name}_native", time.perf_counter() - began, generate
            del writer.next_logits
        if machine.compile:
            seconds = compile_decode(writer, batch_size, dtype if dtype != torch.float32 else None)
            yield f"{name}_compiled", seconds, generate
            del writer.next_logits
