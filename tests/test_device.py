"""minutegpt/device.py: what is chosen and why, and what is said of a device, dtype or number that is not there.

Other machines' choices are tested by telling device.py what those machines would answer.
"""

import ast
import itertools
import json
import math
import os
import re
import subprocess
import sys
import types

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as attention

from minutegpt import device, distributed
from minutegpt.device import Machine, init_machine, matmul_seconds, peak_flops, peak_memory, physical_cores
from minutegpt.distributed import split_batch
from minutegpt.errors import ROOT, UserError
from model import GPT, GPTConfig

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(device, "_has_mps", lambda: False)
    monkeypatch.setattr(device, "_has_xpu", lambda: False)


@pytest.fixture
def no_mps_or_xpu(monkeypatch):
    monkeypatch.setattr(device, "_has_mps", lambda: False)
    monkeypatch.setattr(device, "_has_xpu", lambda: False)


@pytest.fixture
def an_old_gpu(monkeypatch):
    """Two CUDA cards without bfloat16."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla V100-SXM2-16GB")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_70", "sm_90"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 0))
    chosen = {}
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: chosen.update(float32=precision))
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda on: chosen.update(cudnn=on))
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda index: chosen.update(index=index))
    return chosen


def fake_speedup(monkeypatch, speedup):
    monkeypatch.setattr(device, "matmul_seconds", lambda d, t, **_: 1.0 if t == torch.bfloat16 else speedup)


def why(machine):
    return machine.reasons


# ---------------------------------------------------------------------------------------- what is picked


def test_auto_on_this_machine():
    machine = init_machine()
    assert machine.device.type in ("cpu", "cuda", "mps") and machine.dtype in device.DTYPES.values()
    assert list(machine.reasons) == ["device", "dtype", "compile"]
    assert why(machine)["device"].startswith(machine.device.type)
    assert why(machine)["dtype"].startswith(str(machine.dtype).removeprefix("torch."))
    assert why(machine)["compile"].startswith("on" if machine.compile else "off")
    assert all(len(reason) > 10 for reason in machine.reasons.values())
    assert (machine.rank, machine.local_rank, machine.world_size) == (0, 0, 1)
    (torch.ones(2, 2, device=machine.device) @ torch.ones(2, 2, device=machine.device)).sum().item()  # and it is there


def test_by_name():
    machine = init_machine("cpu", "bfloat16", "false")
    assert (machine.device, machine.dtype, machine.compile) == (CPU, torch.bfloat16, False)
    assert all("as asked" in reason for reason in machine.reasons.values())
    assert init_machine("cpu:0", "float32", "True").compile and not init_machine("cpu", "float32", "0").compile


def test_bfloat16_on_a_cpu_only_where_the_probe_shows_that_it_pays(no_gpu, monkeypatch):
    fake_speedup(monkeypatch, 3.14)
    machine = init_machine()
    assert machine.dtype == torch.bfloat16 and "3.1 times as fast" in why(machine)["dtype"]
    fake_speedup(monkeypatch, 0.25)
    machine = init_machine()
    assert machine.dtype == torch.float32 and "0.25 times" in why(machine)["dtype"]


def test_the_probe_measures_products_that_are_done():
    n, flops = 384, 2 * 384**3
    for dtype in (torch.float32, torch.bfloat16):
        assert 1e8 < flops / matmul_seconds(CPU, dtype, n) < 1e14
    assert matmul_seconds(CPU, torch.float32, 512) > 3 * matmul_seconds(CPU, torch.float32, 128)


def test_a_gpu_without_bfloat16_gets_float16_and_its_peak(an_old_gpu):
    machine = init_machine()
    assert machine.device.type == "cuda" and machine.dtype == torch.float16
    assert "V100" in why(machine)["device"] and "scaler" in why(machine)["dtype"]
    assert peak_flops(machine) == (125e12, "data sheet")
    assert init_machine("cuda:1", compile="false").device == torch.device("cuda:1")
    assert init_machine("cpu").device == CPU
    with pytest.raises(UserError, match=r"--device=cuda:2: there is cuda:0 to cuda:1"):
        init_machine("cuda:2")


def test_float32_is_exact_where_losses_are_reported(an_old_gpu):
    init_machine(dtype="float32")
    assert an_old_gpu == {"float32": "high"}
    init_machine(dtype="float32", training=False)  # sample.py, evaluate.py
    assert an_old_gpu == {"float32": "highest", "cudnn": False}
    for script in ("sample.py", "evaluate.py"):
        assert re.search(r"init_machine\(.*training=False\)", (ROOT / script).read_text(encoding="utf-8")), script


def test_a_gpu_asked_for_by_number_is_the_current_one(an_old_gpu):
    init_machine("cuda:1")
    assert an_old_gpu["index"] == 1


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA L40", 181e12), ("NVIDIA L40S", 362e12), ("NVIDIA L4", 121e12), ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10G", 70e12), ("Tesla T4", 65e12), ("NVIDIA RTX A1000", None), ("NVIDIA T400", None),
    ],
)  # fmt: skip
def test_the_peak_is_that_of_the_card_of_this_name(name, peak, an_old_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    monkeypatch.setattr(device, "matmul_flops", lambda machine: 1.0)
    assert peak_flops(init_machine()) == ((peak, "data sheet") if peak else (1.0, "measured matrix product"))


def test_text_is_generated_without_cudnns_attention():
    with Machine(torch.device("cuda"), torch.bfloat16, False).decoding():
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.math_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled()
    assert "machine.decoding()" in (ROOT / "train.py").read_text(encoding="utf-8")


# -- a GPU that this PyTorch cannot use


def test_a_gpu_without_kernels_in_this_pytorch(an_old_gpu, no_mps_or_xpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90a", "sm_120", "compute_120"])
    machine = init_machine(dtype="float32", compile="false")
    assert machine.device == CPU
    assert "no kernels for the Tesla V100-SXM2-16GB (sm_70)" in why(machine)["device"]
    assert "uv pip install --torch-backend=auto" in why(machine)["device"]
    with pytest.raises(UserError, match=r"no kernels for the Tesla V100.*--torch-backend=auto.*Type --device=cpu"):
        init_machine("cuda")
    for capability in ((7, 5), (8, 6), (8, 9), (9, 0), (12, 1)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None, c=capability: c)
        assert init_machine().device.type == "cuda"


@pytest.mark.parametrize(
    ("cuda", "visible", "words"),
    [
        ("13.2", None, r"the NVIDIA driver is too old for this PyTorch's CUDA 13.2. Update it, or: `uv pip install"),
        (None, None, r"built without CUDA; `uv pip install --torch-backend=auto"),  # PyPI's wheel for Windows
        ("13.2", "", "CUDA_VISIBLE_DEVICES hides"),
    ],
)
def test_a_gpu_that_pytorch_does_not_see(cuda, visible, words, no_gpu, monkeypatch):
    monkeypatch.setattr(device.shutil, "which", lambda name: "/usr/bin/nvidia-smi" if name == "nvidia-smi" else None)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert re.search(words, why(init_machine(dtype="float32"))["device"])
    with pytest.raises(UserError, match=words):
        init_machine("cuda")
    monkeypatch.setattr(device.shutil, "which", lambda name: None)
    assert "no GPU that this PyTorch can use" in why(init_machine(dtype="float32"))["device"]


def test_a_gpu_with_bfloat16(an_old_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA GH200 480GB")
    machine = init_machine()
    assert machine.dtype == torch.bfloat16 and peak_flops(machine) == (989e12, "data sheet")


def test_apple_silicon(no_gpu, monkeypatch):
    monkeypatch.setattr(device, "_has_mps", lambda: True)
    machine = init_machine()
    assert machine.device.type == "mps" and machine.dtype == torch.float32 and not machine.compile


@pytest.fixture
def an_intel_gpu(no_gpu, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda index: None)
    monkeypatch.setattr(device, "_has_xpu", lambda: True)
    monkeypatch.setattr(torch.xpu, "get_device_name", lambda device=None: "Intel(R) Arc(TM) B580 Graphics")
    monkeypatch.setattr(torch.xpu, "device_count", lambda: 2)
    monkeypatch.setattr(torch.xpu, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setitem(sys.modules, "triton", types.ModuleType("triton"))


def test_an_intel_gpu(an_intel_gpu, monkeypatch):
    machine = init_machine()
    assert (machine.device.type, machine.dtype, machine.compile) == ("xpu", torch.bfloat16, True)
    assert why(machine)["device"] == "xpu: Intel(R) Arc(TM) B580 Graphics, an Intel GPU"
    assert device.machine_name(machine) == "Intel(R) Arc(TM) B580 Graphics" and device.auto_kind() == "xpu"
    assert device.environment(machine)["name"] == "Intel(R) Arc(TM) B580 Graphics"
    assert init_machine("xpu:1").device == torch.device("xpu:1")
    with pytest.raises(UserError, match="there is xpu:0 to xpu:1"):
        init_machine("xpu:2")
    monkeypatch.setattr(torch.xpu, "is_bf16_supported", lambda including_emulation=True: False)
    assert init_machine().dtype == torch.float32
    monkeypatch.setitem(sys.modules, "triton", None)
    assert not init_machine().compile and "needs on xpu" in why(init_machine())["compile"]


def test_processes_on_intel_gpus_talk_through_xccl(an_intel_gpu, monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(device, "start_processes", lambda backend: (1, 1, 2))
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda index: None)
    machine = init_machine()
    assert machine.device == torch.device("xpu:1") and "xccl: 2 processes" in why(machine)["processes"]


def test_an_amd_gpu_is_named_as_one(an_old_gpu, monkeypatch):
    """PyTorch for ROCm calls the device cuda."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "AMD Instinct MI300X")
    monkeypatch.setattr(torch.version, "hip", "6.4.1")
    assert why(init_machine())["device"] == "cuda: AMD Instinct MI300X, AMD through ROCm 6.4.1"


ON_A_GPU = {"device": "cuda", "dtype": "float32", "compile": "false"}


def test_all_processes_compute_in_the_same_way(monkeypatch):
    """A process that measures another speed, or has another GPU, would wait for the others for ever, or diverge."""
    for asked, worst, dtype, compiled in (
        ("bfloat16", [0.0, 0.0], torch.bfloat16, True), ("bfloat16", [1.0, 0.0], torch.float32, True),
        ("bfloat16", [2.0, 1.0], torch.float16, False), ("float32", [1.0, 1.0], torch.float32, False),
    ):  # fmt: skip
        monkeypatch.setattr(device, "worst_of_all_ranks", lambda own, worst=worst: [*map(max, own, worst)])
        machine = init_machine("cpu", asked, "true")
        assert (machine.dtype, machine.compile) == (dtype, compiled)
        assert ("another process" in machine.reasons["dtype"]) == (machine.dtype != getattr(torch, asked))


def test_the_memory_of_a_process(monkeypatch):
    whole = device.usable_memory(torch.device("cpu"))
    assert whole > 1e8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert device.usable_memory(torch.device("cpu")) == whole / 4


@pytest.mark.parametrize(
    ("saved", "dtype", "compile"),
    [
        ({"device": "cpu", "dtype": "float32", "compile": "false"}, torch.bfloat16, True),  # a laptop's run
        (ON_A_GPU | {"name": "NVIDIA H100"}, torch.float32, False),  # the same card: what the run had
        (ON_A_GPU | {"name": "Tesla T4", "dtype": "float16"}, torch.bfloat16, True),  # another card
        (ON_A_GPU | {"dtype": "float16"}, torch.bfloat16, True),  # an earlier version, which did not name it
    ],
)
def test_a_resumed_run_inherits_from_the_same_device_alone(an_old_gpu, monkeypatch, saved, dtype, compile):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100")
    monkeypatch.setitem(sys.modules, "triton", types.ModuleType("triton"))
    machine = init_machine(saved=saved)
    assert (machine.dtype, machine.compile) == (dtype, compile)


def test_a_gpus_run_goes_on_on_a_cpu_and_on_an_older_gpu(an_old_gpu, monkeypatch):
    h100 = {"device": "cuda", "dtype": "bfloat16", "compile": "true"}
    for saved in (h100, h100 | {"name": "NVIDIA H100"}):
        assert init_machine(saved=saved).dtype == torch.float16  # this GPU would emulate bfloat16
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    fake_speedup(monkeypatch, 1.0)
    for dtype in ("float16", "bfloat16"):
        assert init_machine(saved={**h100, "dtype": dtype, "name": "Tesla T4"}).dtype == torch.float32
    old_cpu = {"device": "cpu", "dtype": "bfloat16", "compile": "false"}
    assert init_machine(saved=old_cpu).dtype == torch.bfloat16  # as that run had, whose version named no CPU
    assert init_machine(saved=old_cpu | {"name": "another CPU"}).dtype == torch.float32


@pytest.mark.parametrize(("capability", "told"), [("AVX512", "1"), ("AVX2", "1"), ("DEFAULT", None)])
def test_the_compiler_builds_no_programs_to_test_vectors_that_pytorch_uses(capability, told, monkeypatch):
    monkeypatch.delenv("TORCHINDUCTOR_VEC_ISA_OK", raising=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    init_machine("cpu")
    assert os.environ.pop("TORCHINDUCTOR_VEC_ISA_OK", None) == told


def test_compile_is_off_where_there_is_no_compiler(no_gpu, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    machine = init_machine("cpu", "float32")
    assert not machine.compile and "no C++ compiler" in why(machine)["compile"]
    compiler = tmp_path / ("cl.exe" if os.name == "nt" else "g++")
    compiler.write_text("")
    compiler.chmod(0o755)
    assert init_machine("cpu", "float32").compile
    monkeypatch.setenv("CXX", "/nowhere/c++")
    assert init_machine("cpu", "float32").compile  # one is left


def test_compile_is_off_for_a_run_too_short_to_earn_it_back(no_gpu, monkeypatch, tmp_path):
    (tmp_path / "g++").write_text("")
    (tmp_path / "g++").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    machine = init_machine("cpu", "float32", minutes=2)
    assert not machine.compile and "a run of under 5 minutes" in why(machine)["compile"]
    assert init_machine("cpu", "float32", "true", minutes=2).compile  # asked for by name
    if os.name != "nt":
        assert init_machine("cpu", "float32", minutes=10).compile and init_machine("cpu", "float32").compile


def test_compile_is_off_on_cuda_without_triton(an_old_gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    machine = init_machine()
    assert not machine.compile and "triton" in why(machine)["compile"]
    monkeypatch.setitem(sys.modules, "triton", types.ModuleType("triton"))
    assert init_machine().compile and init_machine(minutes=5).compile
    machine = init_machine(minutes=1.75)
    assert not machine.compile and "a run of under 3 minutes" in why(machine)["compile"]


# ---------------------------------------------------------------------------------------- what is not there


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"device": "cuda"}, ["--device=cuda is not on this machine", "there is cpu", "--device=cpu"]),
        ({"device": "cuda:3"}, ["--device=cuda:3 is not on this machine"]),
        ({"device": "mps"}, ["--device=mps is not on this machine"]),
        ({"device": "gpu"}, ["--device=gpu is not on this machine", "there is cpu"]),
        ({"device": ""}, ["there is cpu"]),
        ({"device": "cpu:1"}, ["--device=cpu:1", "cpu:0"]),
        ({"device": "cpu:x"}, ["--device=cpu:x"]),
        ({"dtype": "fp16"}, ["--dtype=fp16 is not one of auto, float32, bfloat16, float16"]),
        ({"dtype": "float16"}, ["--dtype=float16", "CUDA", "--dtype=bfloat16 or float32"]),
        ({"dtype": "float64"}, ["--dtype=float64 is not one of"]),
        ({"compile": "maybe"}, ["--compile=maybe is not one of auto, true, false"]),
    ],
)
def test_what_is_not_there(no_gpu, asked, words):
    with pytest.raises(UserError) as error:
        init_machine(**asked)
    assert all(word in str(error.value) for word in words), str(error.value)


# ---------------------------------------------------------------------------------------- the machine


def test_autocast_computes_in_the_dtype():
    x = torch.ones(2, 2)
    for dtype in (torch.bfloat16, torch.float32):
        machine = Machine(CPU, dtype, False)
        with machine.autocast():
            assert (x @ x).dtype == dtype
        with machine.training():
            assert (x @ x).dtype == dtype
    assert (x @ x).dtype == torch.float32


def test_attention_while_training_is_the_same_attention():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 8, 4, dtype=torch.float64)
    with Machine(CPU, torch.float32, False).training():
        written = attention(q, k, v, is_causal=True)
    torch.testing.assert_close(written, attention(q, k, v, is_causal=True))


def test_threads_are_the_physical_cores_unless_the_user_says_otherwise(no_gpu, monkeypatch):
    cores = physical_cores()
    assert 1 <= cores <= (os.cpu_count() or 1)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    torch.set_num_threads(1)
    assert f"{cores} threads" in why(init_machine("cpu", "float32"))["device"] and torch.get_num_threads() == cores
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    assert "1 threads" in why(init_machine("cpu", "float32"))["device"] and torch.get_num_threads() == 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity to set here")
def test_only_cores_that_this_process_may_use_count():
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert physical_cores() == 1
    finally:
        os.sched_setaffinity(0, before)


def test_the_peak_and_the_memory_are_measured():
    peak, source = peak_flops(Machine(CPU, torch.float32, False))
    assert 1e8 < peak < 1e14 and "measured" in source
    if os.name == "nt":
        return
    before = peak_memory(CPU)
    assert 1e7 < before < 1e12
    held = torch.ones(int(before / 4 * 1.5))  # more than there ever was
    assert peak_memory(CPU) >= held.nbytes


def test_rows_divide_among_processes_or_it_says_so():
    for batch, accumulation, world in itertools.product((1, 2, 3, 12, 64), (1, 2, 5, 8, 40), (1, 2, 4, 5, 8, 16)):
        if batch * accumulation % world:
            with pytest.raises(UserError, match=f"{batch} x {accumulation} rows does not divide among {world}"):
                split_batch(batch, accumulation, world)
            continue
        micro_steps, micro_batch = split_batch(batch, accumulation, world)
        assert micro_steps * micro_batch * world == batch * accumulation and micro_batch <= batch
    assert split_batch(12, 40, 8) == (5, 12) and split_batch(64, 1, 4) == (1, 16) and split_batch(12, 5, 1) == (5, 12)


def test_the_environment_is_plain_values():
    machine = init_machine("cpu", "bfloat16", "false")
    found = device.environment(machine)
    assert json.loads(json.dumps(found)) == found
    assert (found["device"], found["dtype"], found["compile"]) == ("cpu", "bfloat16", "false")
    again = init_machine(found["device"], found["dtype"], found["compile"])  # what a resumed run does
    assert device.environment(again) == found


def test_alone_everyone_agrees():
    assert distributed.sync(0.25, 3.0) == [0.25, 3.0]


@pytest.mark.slow
def test_processes_agree_on_what_rank_0_says():
    code = (
        "import torch.distributed as dist; from minutegpt.device import init_machine;"
        "from minutegpt.distributed import sync; m = init_machine('cpu', 'float32');"
        "print(m.rank, m.world_size, sync(m.rank + 5.5)[0], m.reasons['processes']); dist.destroy_process_group()"
    )
    env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29613", "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=env | {"RANK": str(rank)},
                         stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]  # fmt: skip
    told = [process.communicate(timeout=60)[0].strip() for process in started]
    assert told == [f"{rank} 2 5.5 gloo: 2 processes share each step" for rank in range(2)]


def test_no_other_file_knows_a_device_by_name():
    """Comments and messages may; code that asks `== "cuda"` or calls torch.cuda may not."""
    files = [*ROOT.glob("*.py"), *ROOT.glob("minutegpt/*.py"), *ROOT.glob("prepare/*.py"), *ROOT.glob("config/*.py")]
    files += [*ROOT.glob("minutegpt/data/*.py"), *ROOT.glob("dev/*.py")]
    found = []
    for path in files:
        if path.name == "device.py":
            continue
        text = path.read_text(encoding="utf-8")
        if path.name == "config.py":  # the names of sections, which it must know without importing torch
            text = re.sub(r"^DEVICE_KINDS = .*", "", text, count=1, flags=re.M)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Constant) and node.value in ("cuda", "mps", "xpu"):
                found.append(f"{path.name}:{node.lineno}")
            if isinstance(node, ast.Attribute) and node.attr in ("cuda", "mps"):
                found.append(f"{path.name}:{node.lineno}")
    assert not found, found


# -- dropout on a CPU


@pytest.mark.parametrize("p", [0.1, 0.2, 0.5, 0.99])
@pytest.mark.parametrize("shape", [(7, 50_001), (100, 20, 176)])
def test_fast_dropout_drops_its_share_and_keeps_the_mean(p, shape):
    torch.manual_seed(0)
    x = torch.ones(shape, requires_grad=True)
    y = device.FastDropout(p)(x)
    n, kept = y.numel(), (y != 0).float()
    sigma = math.sqrt(p * (1 - p) / n)
    assert kept.mean().item() == pytest.approx(1 - p, abs=5 * sigma + 2**-17)
    assert y.mean().item() == pytest.approx(1, abs=5 * sigma / (1 - p))
    assert torch.allclose(y[y != 0], torch.tensor(2**16 / (2**16 - round(p * 2**16))), rtol=1e-6)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())  # the gradient is dropped where the value was
    flat = kept.flatten()[: n // 4 * 4].view(-1, 4)  # four elements share one random number
    for lane in range(4):
        assert flat[:, lane].mean().item() == pytest.approx(1 - p, abs=10 * sigma + 2**-17)
    centred = kept.flatten() - (1 - p)
    for distance in (1, 2, 3, 4, 5, 8):
        together = (centred[distance:] * centred[:-distance]).mean().item()
        assert abs(together) < 5 * p * (1 - p) / math.sqrt(n)  # neighbours are independent


def test_fast_dropout_of_nothing_and_of_almost_all():
    x, half = torch.randn(3, 5), device.FastDropout(0.5)
    assert torch.equal(device.FastDropout(0.0)(x), x) and torch.equal(device.FastDropout(0.5).eval()(x), x)
    assert torch.isfinite(device.FastDropout(1 - 1e-9)(x)).all()
    assert half(x.bfloat16()).dtype == torch.bfloat16 and half(torch.empty(0, 4)).shape == (0, 4)
    torch.manual_seed(1)
    once = half(x)
    torch.manual_seed(1)
    assert torch.equal(once, half(x))


@pytest.mark.parametrize("settings", [{}, {"n_expert": 4}])
def test_fast_dropout_replaces_every_dropout_layer_of_a_model_on_a_cpu(settings):
    tiny = GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=32, dropout=0.3, **settings)
    model, idx = GPT(tiny), torch.randint(11, (2, 8))
    names, expected = list(model.state_dict()), model.eval()(idx)[0]
    model.transformer.h[0].train()
    device.fast_dropout(model)
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    assert len(layers) == 1 + 2 * 2 and {(type(layer), layer.p) for layer in layers} == {(device.FastDropout, 0.3)}
    assert [layer.training for layer in layers] == [True, True, False, False, False]  # as they were
    assert list(model.state_dict()) == names and torch.equal(model.eval()(idx)[0], expected)
    with torch.device("meta"):
        elsewhere = GPT(tiny)
    device.fast_dropout(elsewhere)
    assert not any(isinstance(module, device.FastDropout) for module in elsewhere.modules())
