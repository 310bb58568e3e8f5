"""Device, number format and compilation: chosen for this machine, each with its reason in words.

The only file that knows a device by name.
"""

import contextlib
import ctypes
import logging
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from minutegpt.distributed import start_processes, under_torchrun, worst_of_all_ranks
from minutegpt.errors import UserError

PADDED = ("cuda", "xpu")  # devices whose matrix products want aligned rows
FUSED_ADAMW = ("cpu", "cuda", "mps", "xpu")  # devices with a fused kernel for it
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# dense bfloat16 (float16 on cards before it) peak of common GPUs, FLOP/s, from their data sheets
PEAKS = {
    "H200": 989e12, "H100": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "GH200": 989e12, "B200": 2250e12,
    "A100": 312e12, "A10G": 70e12, "A10": 125e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12, "T4": 65e12,
    "V100": 125e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip


@dataclass
class Machine:
    """What was chosen, and why: `reasons` maps each choice to its value and reason in words.

    rank, local_rank and world_size are 0, 0 and 1 outside torchrun. ddp: each process has the whole model.
    """

    device: torch.device
    dtype: torch.dtype
    compile: bool
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def ddp(self) -> bool:
        return self.world_size > 1

    @property
    def matmul_dtype(self) -> torch.dtype:
        """What matrix products outside autocast, as Muon's, should compute in."""
        return torch.bfloat16 if self.dtype == torch.bfloat16 else torch.float32

    @property
    def compile_muon(self) -> bool:
        """Whether Muon's Newton-Schulz steps are compiled: on a GPU, where their launches take longer than their work.

        On a CPU they are large matrix products, and compiling them would only delay the start.
        """
        return self.compile and not self.is_cpu

    @property
    def is_cpu(self) -> bool:
        return self.device.type == "cpu"

    def autocast(self) -> contextlib.AbstractContextManager:
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Around a forward pass that has a backward pass.

        In bfloat16 on a CPU, attention is then computed by plain matrix products: with its backward pass the fused
        kernel takes longer there. In float32, and without a backward pass, the fused kernel is the faster one.
        """
        with self.autocast():
            if self.device.type == "cpu" and self.dtype == torch.bfloat16:
                with sdpa_kernel(SDPBackend.MATH):
                    yield
            else:
                yield

    def decoding(self) -> contextlib.AbstractContextManager:
        """Around the generation of text: attention without cuDNN, which plans each length of the cache first.

        On Hopper and Blackwell PyTorch prefers cuDNN; a plan takes it tens to hundreds of milliseconds.
        """
        if self.device.type != "cuda":
            return contextlib.nullcontext()
        return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])

    def to_device(self, tokens: Tensor) -> Tensor:
        """Copies a batch to the device. On CUDA the copy runs while the CPU goes on."""
        if self.device.type == "cuda":
            tokens = tokens.pin_memory()
        return tokens.to(self.device, non_blocking=True)

    def wrap(self, model: nn.Module, logits: bool = False) -> Any:
        """The model as training calls it: compiled, and under DDP where there are several processes.

        It returns (None, loss); logits: it returns (logits, loss).
        """
        fast_dropout(model)
        pad_head(model)
        train_model: Any = ForTraining(model, logits)
        if self.compile:
            train_model = torch.compile(train_model)
        if self.ddp:  # no buffers are broadcast: each rank counts the tokens of its own experts
            from torch.nn.parallel import DistributedDataParallel

            warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)  # its successor is too new for us
            train_model = DistributedDataParallel(train_model, broadcast_buffers=False, gradient_as_bucket_view=True)
        return train_model

    def disable_compile(self, reason: str) -> None:
        """What torch.compile has made already runs uncompiled from now on."""
        self.compile = False
        torch.compiler.set_stance("force_eager")
        self.reasons["compile"] = f"off: it fails here ({reason})"


def init_machine(
    device: str = "auto", dtype: str = "auto", compile: str = "auto", *, minutes: float = math.inf,
    deterministic: bool = False, saved: dict[str, Any] | None = None, training: bool = True,
) -> Machine:  # fmt: skip
    """Chooses what is `auto`, checks what was asked for by name, and joins the processes of torchrun.

    minutes: how long the run takes. saved: the environment of the run that goes on: on the same kind of
    device, auto then means what it meant there. training: no exact float32 is needed.
    Raises UserError, with what there is, for a device or dtype that this machine lacks.
    """
    reasons = {}
    kind = device.split(":")[0]
    available = _kinds()
    if kind == "auto":
        kind = device = available[0]
        if kind == "cuda":
            rocm = f", AMD through ROCm {torch.version.hip}" if torch.version.hip else ""  # it calls itself cuda
            reasons["device"] = f"cuda: {torch.cuda.get_device_name()}{rocm}"
        elif kind == "xpu":
            reasons["device"] = f"xpu: {torch.xpu.get_device_name()}, an Intel GPU"
        elif kind == "mps":
            reasons["device"] = "mps: the GPU of Apple silicon"
        else:
            reasons["device"] = f"cpu: {_why_no_gpu()}; {cpu_name()}, {_set_threads()} threads"
    elif kind not in available:
        reason = f": {_why_no_gpu()}" if kind == "cuda" else ""
        raise UserError(
            f"--device={device} is not on this machine, as this PyTorch ({torch.__version__}) sees it{reason}; there "
            f"is {', '.join(available)}. Type --device={available[0]}, or leave --device out"
        )
    else:
        reasons["device"] = f"{device}: as asked" + (f"; {_set_threads()} threads" if kind == "cpu" else "")
    if ":" in device and (not device.split(":")[1].isdigit() or int(device.split(":")[1]) >= _count(kind)):
        raise UserError(f"--device={device}: there is {kind}:0 to {kind}:{_count(kind) - 1}. Type one of them")
    if ":" in device and kind in ("cuda", "xpu"):  # else pinned memory and questions go to GPU 0
        torch.accelerator.set_device_index(int(device.split(":")[1]))

    rank, local_rank, world_size = 0, 0, 1
    if under_torchrun():
        backend = {"cuda": "nccl", "xpu": "xccl"}.get(kind, "gloo")
        if kind in ("cuda", "xpu"):
            local_rank = int(os.environ.get("LOCAL_RANK", 0))
            if local_rank >= _count(kind):
                raise UserError(
                    f"torchrun started process {local_rank} on this machine, which has {_count(kind)} GPUs. "
                    f"Type --nproc_per_node={_count(kind)}"
                )
            device = f"{kind}:{local_rank}"
            torch.accelerator.set_device_index(local_rank)
        rank, local_rank, world_size = start_processes(backend)
        reasons["processes"] = f"{backend}: {world_size} processes share each step"

    # checkpoints of earlier versions do not name the device: a GPU may then be another one
    unnamed = device_name(kind) if kind == "cpu" else ""
    if saved and saved.get("device") == kind and saved.get("name", unnamed) == device_name(kind):
        dtype = saved["dtype"] if dtype == "auto" else dtype
        compile = saved["compile"] if compile == "auto" else compile
    if dtype == "auto":
        dtype, reason = _choose_dtype(kind)
        reasons["dtype"] = f"{dtype}: {reason}"
    elif dtype not in DTYPES:
        raise UserError(f"--dtype={dtype} is not one of auto, {', '.join(DTYPES)}. Type one of them")
    elif dtype == "float16" and kind != "cuda":
        raise UserError(f"--dtype=float16 trains on CUDA alone; this is {kind}. Type --dtype=bfloat16 or float32")
    else:
        reasons["dtype"] = f"{dtype}: as asked"

    choice = compile.lower()
    if choice not in ("auto", "true", "false", "1", "0"):
        raise UserError(f"--compile={compile} is not one of auto, true, false. Type one of them")
    reason = "as asked"
    if choice == "auto":
        choice, reason = _choose_compile(kind, minutes)
    compiled = choice in ("true", "1")
    reasons["compile"] = f"{'on' if compiled else 'off'}: {reason}"
    order = ("bfloat16", "float32", "float16")  # processes with different choices would wait for each other, or diverge
    common, uncompiled = worst_of_all_ranks([float(order.index(dtype)), float(not compiled)])
    if order[int(common)] != dtype:
        dtype = order[int(common)]
        reasons["dtype"] = f"{dtype}: as in another process"
    if compiled and uncompiled:
        compiled, reasons["compile"] = False, "off: as in another process"

    if kind == "cpu":
        _keep_memory()
        if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):  # PyTorch's own kernels use them already
            os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")  # torch.compile would build programs to test them
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # training()'s attention stays in bfloat16
        if compiled:
            # it looks for CUDA, and would say that it found none
            logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
            from torch._inductor import config as inductor  # takes seconds to import

            inductor.fallback_random = True  # compiled dropout then draws as fast as eager dropout, and the same
    if kind == "cuda":  # where losses are reported, float32 is exact
        torch.set_float32_matmul_precision("high" if training else "highest")  # high: TF32, on the tensor cores
        if not training:
            torch.backends.cuda.enable_cudnn_sdp(False)  # see Machine.decoding
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    return Machine(torch.device(device), DTYPES[dtype], compiled, rank, local_rank, world_size, reasons)


def auto_kind() -> str:
    """The kind of device that --device=auto takes: cuda, mps, xpu or cpu."""
    return _kinds()[0]


def _kinds() -> list[str]:
    """The kinds of device that are here, the fastest first."""
    found = {"cuda": _has_cuda(), "mps": _has_mps(), "xpu": _has_xpu(), "cpu": True}
    return [kind for kind, here in found.items() if here]


def _has_cuda() -> bool:
    """Whether there is a CUDA GPU that has kernels in this PyTorch."""
    return torch.cuda.is_available() and not _without_kernels()


def _without_kernels() -> str:
    """Names a GPU that this PyTorch was not built for; "" where there is none."""
    built = [int(arch.split("_")[1].rstrip("af")) for arch in torch.cuda.get_arch_list() if arch.startswith("sm_")]
    if torch.version.hip or not built:
        return ""
    major, minor = torch.cuda.get_device_capability()
    # kernels run on later GPUs of the same generation; torch.compile and PTX cover later generations
    return "" if 10 * major + minor >= min(built) else f"{torch.cuda.get_device_name()} (sm_{major}{minor})"


def _why_no_gpu() -> str:
    """Why auto takes the CPU. Where there is an NVIDIA GPU: what keeps PyTorch from it, and the command that helps."""
    mend = "`uv pip install --torch-backend=auto --reinstall torch` installs one that can"
    if torch.cuda.is_available():
        return f"this PyTorch has no kernels for the {_without_kernels()}; {mend}"
    if not shutil.which("nvidia-smi"):
        return "no GPU that this PyTorch can use"
    if not torch.version.cuda:
        return f"the NVIDIA GPU is not used, as this PyTorch was built without CUDA; {mend}"
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return "CUDA_VISIBLE_DEVICES hides the NVIDIA GPU"
    return f"the NVIDIA driver is too old for this PyTorch's CUDA {torch.version.cuda}. Update it, or: {mend}"


def _has_mps() -> bool:
    return torch.backends.mps.is_available()


def _has_xpu() -> bool:
    return torch.xpu.is_available()


def _count(kind: str) -> int:
    return {"cuda": torch.cuda, "xpu": torch.xpu}[kind].device_count() if kind in ("cuda", "xpu") else 1


def _choose_dtype(kind: str) -> tuple[str, str]:
    if kind == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bfloat16", "native on this GPU"
        return "float16", "this GPU has no bfloat16; a gradient scaler keeps small gradients"
    if kind == "xpu":
        return (
            ("bfloat16", "native on this GPU") if torch.xpu.is_bf16_supported() else ("float32", "it has no bfloat16")
        )
    if kind == "mps":
        return "float32", "exact, and on this GPU not much slower than half precision"
    cpu, best = torch.device("cpu"), dict.fromkeys((torch.float32, torch.bfloat16), float("inf"))
    for _ in range(3):  # alternating, so that a busy moment does not slow down only one of them
        best = {dtype: min(seconds, matmul_seconds(cpu, dtype)) for dtype, seconds in best.items()}
        speedup = best[torch.float32] / best[torch.bfloat16]
        if speedup < 0.25:  # emulated: one round takes 0.4 s, and is clear
            break
    if speedup > 1.2:
        return "bfloat16", f"a matrix product is {speedup:.1f} times as fast as in float32 here"
    return "float32", f"bfloat16 is not native here ({speedup:.2g} times float32's speed)"


def _choose_compile(kind: str, minutes: float) -> tuple[str, str]:
    if kind == "mps":
        return "false", "torch.compile is not yet steady on mps"
    if kind in ("cuda", "xpu"):
        try:
            import triton  # noqa: F401
        except ImportError:
            return "false", f"triton, which it needs on {kind}, is not installed"
        if minutes < 3:  # compiling takes 30 to 90 seconds
            return "false", "a run of under 3 minutes does not earn back the compiler's time"
        return "true", "fused kernels; the first step waits for them"
    if minutes < 5:  # compiling takes about half a minute
        return "false", "a run of under 5 minutes does not earn back the compiler's time"
    names = [os.environ.get("CXX", ""), *(("cl",) if os.name == "nt" else ("g++", "clang++"))]
    compiler = next((name for name in names if name and shutil.which(name)), None)
    if compiler is None:
        return "false", "no C++ compiler on this machine (torch.compile needs one; training works without)"
    return "true", f"fused kernels, built by {compiler}; the first step waits for them, later runs find them cached"


def _keep_memory() -> None:
    """Makes glibc keep the memory that a step frees for the next step, instead of returning it to the system."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library
            libc = ctypes.CDLL(None)
            libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
            libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def matmul_seconds(device: torch.device, dtype: torch.dtype, n: int = 384, repeats: int = 5) -> float:
    """The best time of one (n, n) @ (n, n) product, in seconds."""
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(repeats + 1):  # the first one warms up: it only counts if nothing beats it
        synchronize(device)
        start = time.perf_counter()
        a @ b
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def peak_flops(machine: Machine) -> tuple[float, str]:
    """What the device can do at most, FLOP/s, and where the figure comes from: its data sheet, or measured here."""
    if machine.device.type == "cuda" and machine.dtype != torch.float32:
        name = torch.cuda.get_device_name(machine.device)
        for key in sorted(PEAKS, key=len, reverse=True):
            if re.search(rf"\b{key}\b", name):  # an L40 is no L4
                return PEAKS[key], "data sheet"
    return matmul_flops(machine), "measured matrix product"


def usable_dtypes(device: torch.device) -> dict[str, torch.dtype]:
    """The dtypes that this kind of device can train in."""
    return {name: dtype for name, dtype in DTYPES.items() if name != "float16" or device.type == "cuda"}


def synchronize(device: torch.device) -> None:
    """Waits until the device has done all that was asked of it: before reading a clock."""
    if device.type == "mps":
        torch.mps.synchronize()
    elif device.type != "cpu":
        torch.accelerator.synchronize(device)


def peak_memory(device: torch.device) -> float:
    """The most memory held so far, in bytes: a CUDA or Intel GPU's, else the process's; 0 where it cannot be had."""
    if device.type in ("cuda", "xpu"):
        return torch.accelerator.max_memory_allocated(device)
    if os.name == "nt":
        return 0.0
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def usable_memory(device: torch.device) -> float:
    """Bytes that each process of a run may take: what is free on its GPU, else their share of half of the memory."""
    if device.type in ("cuda", "xpu"):
        with contextlib.suppress(RuntimeError):  # some Intel GPUs cannot tell
            return float(getattr(torch, device.type).mem_get_info(device)[0])
    total = 8e9
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError):  # a container's limit, or "max"
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return total / 2 / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def cpu_name() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _set_threads() -> int:
    """One thread a physical core: two on one core share the arithmetic units, and get in each other's way."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(physical_cores())
    return torch.get_num_threads()


def physical_cores() -> int:
    """Physical cores that this process may use."""
    if sys.platform == "darwin":  # performance cores alone: the efficient ones would hold the others up
        for key in ("hw.perflevel0.physicalcpu", "hw.physicalcpu"):
            found = subprocess.run(["sysctl", "-n", key], capture_output=True, text=True).stdout.strip()
            if found.isdigit():
                return int(found)
    if hasattr(os, "sched_getaffinity"):
        allowed = os.sched_getaffinity(0)
        cores = set()
        for cpu in allowed:
            try:
                with open(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", encoding="utf-8") as file:
                    cores.add(file.read().strip())
            except OSError:
                return len(allowed)
        return len(cores)
    return torch.get_num_threads()


def environment(machine: Machine) -> dict[str, str | int]:
    """What the bits of a run depend on, next to its config, in plain values: saved, and compared at a resume."""
    return {
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "device": machine.device.type,
        "dtype": str(machine.dtype).removeprefix("torch."),
        "compile": str(machine.compile).lower(),
        "threads": torch.get_num_threads(),
        "world_size": machine.world_size,
        "name": device_name(machine.device.type),
    }


def device_name(kind: str) -> str:
    """The name of the GPU or CPU model: another one may compute other bits, and want another dtype."""
    if kind in ("cuda", "xpu"):
        return {"cuda": torch.cuda, "xpu": torch.xpu}[kind].get_device_name()
    return cpu_name() if kind == "cpu" else kind


class ForTraining(nn.Module):
    """A model that returns (None, loss), or (logits, loss) with `logits`: distillation needs them.

    Logits that a compiled step returns cost it 10 to 20%: they are written in float32, and the backward pass reads a
    gradient of zeros for them (PyTorch issue 131794).
    """

    def __init__(self, model: nn.Module, logits: bool) -> None:
        super().__init__()
        self.model, self.logits = model, logits

    def forward(self, idx: Tensor, targets: Tensor) -> tuple[Tensor | None, Tensor]:
        logits, loss = self.model(idx, targets)
        return logits if self.logits else None, loss


class PaddedLinear(nn.Linear):
    """nn.Linear that computes a multiple of 64 outputs and returns the real ones: odd rows slow a GPU's products.

    The weight keeps its shape, so seeds, checkpoints and the loss know no padding. Under autocast, each pass copies
    the weight anyway.
    """

    def forward(self, x: Tensor) -> Tensor:
        V = self.out_features
        return F.linear(x, F.pad(self.weight, (0, 0, 0, -V % 64)))[..., :V]


def pad_head(model: nn.Module) -> None:
    """Makes the output layer of a model on a GPU a PaddedLinear, in place; `weight` remains the same parameter."""
    head = getattr(model, "lm_head", None)
    if type(head) is nn.Linear and head.weight.device.type in PADDED and head.out_features % 64:
        padded = PaddedLinear(head.in_features, head.out_features, bias=False, device="meta")
        padded.weight = head.weight
        model.lm_head = padded


class FastDropout(nn.Dropout):
    """nn.Dropout for a CPU. One random number of 64 bits decides for four elements; p is rounded to 1/65536."""

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and self.p):
            return x
        dropped = min(round(self.p * 2**16), 2**16 - 1)  # of the 2**16 values of 16 bits
        bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
        keep = (bits.view(torch.int16)[: x.numel()] >= dropped - 2**15).view(x.shape)
        return torch.where(keep, x * (2**16 / (2**16 - dropped)), 0.0)


def fast_dropout(model: nn.Module) -> None:
    """Replaces the dropout layers of a model on a CPU, in place: PyTorch draws one number per element, which is slower.

    On other devices it changes nothing. Call it after `model.to(device)` and before torch.compile.
    """
    if next(model.parameters()).device.type != "cpu":
        return
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Dropout:
                setattr(parent, name, FastDropout(child.p).train(child.training))


def process_environment(slot: int, of: int) -> dict[str, str]:
    """Environment variables that give process number `slot` of several its share of this machine: a GPU, or cores."""
    if of == 1:
        return {}
    if torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        return {"CUDA_VISIBLE_DEVICES": visible.split(",")[slot % len(visible.split(","))]}
    return {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // of))}


def machine_name(machine: Machine) -> str:
    """The name of the device that a machine computes on."""
    if machine.device.type == "cuda":
        return torch.cuda.get_device_name(machine.device)
    return device_name(machine.device.type)


def matmul_flops(machine: Machine, dtype: torch.dtype | None = None) -> float:
    """FLOP/s of a large matrix product, measured; by default in the dtype that training uses."""
    n = 1024 if machine.is_cpu else 8192
    return 2 * n**3 / matmul_seconds(machine.device, dtype or machine.dtype, n)
