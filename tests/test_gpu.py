"""What has to be looked at on a GPU, in the order of its importance: `pytest -m gpu -x`, or dev/gpu_check.py.

Nobody has run these on a GPU yet. They skip where there is none. MINUTEGPT_GPU_TEST_ON=cpu runs the bodies of those
that need no GPU of their own on a CPU, with the same bounds: so the tests work, whatever a GPU says.
Numbers that are worth keeping go to record_property; dev/gpu_check.py writes them down.
"""

import copy
import json
import math
import os
import time
from pathlib import Path

import pytest
import torch
from harness import ROOT, free_port, losses, optimizers_of, run, start, tiny

from minutegpt.checkpoint import read_checkpoint
from minutegpt.device import Machine, init_machine, peak_memory, synchronize
from model import GPT, GPTConfig, KVCache

ON = os.environ.get("MINUTEGPT_GPU_TEST_ON") or ("cuda" if torch.cuda.is_available() else "")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not ON, reason="needs a GPU")]
on_cuda = pytest.mark.skipif(not ON.startswith("cuda"), reason="needs CUDA")
BASE = {"block_size": 32, "vocab_size": 65, "n_layer": 2, "n_head": 4, "n_embd": 64}
FAST = {"pos": "rope", "norm": "rmsnorm", "qk_norm": True, "activation": "relu2", "tie": False}
BLOCKS = {
    "classic": {}, "post": {"norm_position": "post"}, "gqa": {"n_kv_head": 2, "bias": True},
    "fast": FAST | {"ngram": 4, "ngram_rows": 500}, "experts": {"n_expert": 4},
}  # fmt: skip
CHAR = {"block_size": 256, "vocab_size": 65, "n_layer": 6, "n_head": 6, "n_embd": 384}
GPT2 = {"block_size": 1024, "vocab_size": 50257, "n_layer": 12, "n_head": 12, "n_embd": 768}


@pytest.fixture(autouse=True)
def float32_is_exact():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def script(name: str | Path, *argv: str, cwd: Path, **how: object):
    """Runs a script in a Python of its own: a fork cannot use CUDA."""
    done = run(name, *argv, cwd=cwd, fork=False, seconds=1200, **how)
    assert done.status == 0, done.output
    return done


def models(settings: dict) -> tuple[GPT, GPT]:
    """The same model on the CPU and on the device, with n-gram tables that are not zeros."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**BASE | settings))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".ngrams." in name:
                p.normal_(std=0.02)
    return model, copy.deepcopy(model).to(ON)


def step_of(settings: dict, rows: int, machine: Machine):
    """A training step of a random model on random tokens, as a function."""
    model = GPT(GPTConfig(**settings)).to(machine.device)
    train_model, [optimizer] = machine.wrap(model), optimizers_of(model)
    tokens = torch.randint(settings["vocab_size"], (rows, settings["block_size"] + 1), device=machine.device)

    def step() -> None:
        with machine.training():
            _, loss = train_model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


# -- 1 to 8 take about 6 minutes


def test_01_what_is_chosen(record_property):
    machine = init_machine(ON if ":" in ON else "auto" if ON != "cpu" else "cpu")
    for choice, reason in machine.reasons.items():
        record_property(choice, reason)
    assert machine.device.type == ON.split(":")[0]
    if machine.device.type == "cuda":
        major, minor = torch.cuda.get_device_capability()
        assert any(f"{major}{minor}" in arch or f"_{major}0" in arch for arch in torch.cuda.get_arch_list())
        assert machine.dtype in (torch.bfloat16, torch.float16) and machine.compile
    assert (torch.ones(3, device=machine.device) + 1).sum().item() == 6


@pytest.mark.parametrize("block", BLOCKS)
def test_02_a_model_computes_as_on_the_cpu(block):
    torch.set_float32_matmul_precision("highest")
    cpu, device = models(BLOCKS[block])
    tokens = torch.randint(65, (3, 33), generator=torch.Generator().manual_seed(1))
    x, y = tokens[:, :-1], tokens[:, 1:]
    expected, loss = cpu(x, y)
    logits, device_loss = device(x.to(ON), y.to(ON))
    torch.testing.assert_close(logits.cpu(), expected, atol=1e-4, rtol=1e-4)
    loss.backward()
    device_loss.backward()
    for (name, p), q in zip(cpu.named_parameters(), device.parameters(), strict=True):
        assert (q.grad.cpu() - p.grad).norm() <= 1e-3 * p.grad.norm() + 1e-7, name
    with torch.no_grad(), torch.autocast(torch.device(ON).type, torch.bfloat16):
        assert abs(device(x.to(ON), y.to(ON))[1].item() - loss.item()) < 2e-2
    cache = KVCache(device.config, 3, torch.device(ON), torch.float32)
    with torch.no_grad():  # a prompt, then token after token
        steps = [device.eval().next_logits(x[:, :5].to(ON), cache)]
        steps += [device.next_logits(x[:, i : i + 1].to(ON), cache) for i in range(5, 12)]
    torch.testing.assert_close(torch.stack(steps, 1).cpu(), expected[:, 4:12], atol=1e-3, rtol=1e-3)


def test_03_evaluation_is_the_cpus(house):
    script("train.py", *tiny(max_iters=3), "--out_dir=three", cwd=house)
    found = []
    for device in ("cpu", ON):
        done = script("evaluate.py", "--out_dir=three", "--json", f"--device={device}", "--dtype=float32", cwd=house)
        found.append(json.loads(done.out.splitlines()[-1])["loss"])
    assert found[1] == pytest.approx(found[0], rel=1e-5)


@on_cuda
def test_04_the_attention_that_is_chosen(record_property):
    from torch.profiler import ProfilerActivity, profile

    machine = init_machine(ON, "auto", "false")
    model = GPT(GPTConfig(**CHAR)).to(ON)
    x = torch.zeros(4, 256, dtype=torch.int64, device=ON)
    names = []
    for training in (True, False):
        with profile(activities=[ProfilerActivity.CUDA]) as profiled, machine.autocast():
            if training:
                model(x, x)[1].backward()
            else:
                model.eval().generate(x[:1, :1], 20)
            synchronize(machine.device)
        kernels = {event.key.lower() for event in profiled.key_averages()}
        names.append(sorted(k for k in kernels if any(word in k for word in ("cudnn", "flash", "fmha", "efficient"))))
        record_property("training" if training else "decoding", "; ".join(name[:60] for name in names[-1]))
    assert names[0], "training uses no fused attention"
    assert not any("cudnn" in name for name in names[1]), "cuDNN makes a plan for each length of the cache"


def test_05_a_sample_comes_at_once(record_property):
    machine = init_machine(ON, "auto", "false")
    model = GPT(GPTConfig(**BASE | {"block_size": 128})).to(ON).eval()
    for call in ("first", "second"):
        began = time.perf_counter()
        with machine.autocast():
            model.generate(torch.zeros(1, 1, dtype=torch.int64, device=ON), 120, top_k=20)
        synchronize(machine.device)
        record_property(call, seconds := time.perf_counter() - began)
        assert ON == "cpu" or seconds < (5 if call == "first" else 1)  # the first loads kernels


RECIPES = {
    "uncompiled": {"compile": "false"}, "muon": {"compile": "false", "optimizer": "muon"},
    "compiled": {"compile": "true"}, "compiled-muon": {"compile": "true", "optimizer": "muon"},
    "compiled-fast": {"compile": "true", "optimizer": "muon", "ngram": 4} | FAST,
    "compiled-experts": {"compile": "true", "n_expert": 4}, "qat": {"compile": "false", "qat": "int8"},
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_06_training_is_the_cpus(house, name):
    if ON == "cpu" and name.startswith("compiled"):
        pytest.skip("the compiler of a CPU takes minutes")
    settings = {"max_iters": 20, "dropout": 0.0} | RECIPES[name]
    script("train.py", *tiny(**settings | {"compile": "false"}), f"--out_dir={name}-cpu", cwd=house)
    settings |= {"device": ON, "dtype": "auto" if ON != "cpu" else "float32"}
    environment = {"TORCH_LOGS": "recompiles,graph_breaks"} if name.startswith("compiled") else {}
    done = script("train.py", *tiny(**settings), f"--out_dir={name}", cwd=house, env=environment)
    assert "it fails here" not in done.output
    assert "Graph break" not in done.output and "Recompiling" not in done.output, done.output
    assert losses(house / name) == pytest.approx(losses(house / f"{name}-cpu"), abs=0.02)


OVERFLOW = f"""
import os, runpy, sys
sys.path.insert(0, {str(ROOT)!r})
sys.argv[0] = {str(ROOT / "train.py")!r}
import minutegpt.errors, torch
calls, real = [], torch.amp.GradScaler.unscale_
def unscale_(scaler, optimizer):
    calls.append(0)
    if len(calls) == 41:  # in one of the two optimizers
        next(p for group in optimizer.param_groups for p in group["params"]).grad.view(-1)[0] = float("inf")
    return real(scaler, optimizer)
torch.amp.GradScaler.unscale_ = unscale_
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@on_cuda
@pytest.mark.parametrize("grad_clip", [1.0, 0.0])
def test_07_float16_with_muon_skips_an_overflow(house, grad_clip):
    (house / "overflow.py").write_text(OVERFLOW, encoding="utf-8")
    settings = tiny(max_iters=200, device=ON, dtype="float16", optimizer="muon", grad_clip=grad_clip, eval_interval=100)
    script(house / "overflow.py", *settings, "--out_dir=half", "--overwrite", cwd=house)
    state, found = read_checkpoint(house / "half" / "ckpt.pt"), losses(house / "half")
    assert all(torch.isfinite(weight).all() for weight in state["model"].values())
    assert found[200] < found[1] - 1


def test_08_a_killed_run_resumes_to_the_same_bits(house):
    settings = tiny(max_iters=40, device=ON, dtype="auto" if ON != "cpu" else "float32", deterministic="true")
    script("train.py", *settings, "--out_dir=straight", cwd=house)
    killed = start("train.py", *settings, "--out_dir=killed", cwd=house, fork=False)
    killed.await_output("step 12/")
    killed.process.kill()
    killed.wait()
    script("train.py", "--init_from=resume", "--out_dir=killed", cwd=house)
    a, b = (read_checkpoint(house / name / "ckpt.pt")["model"] for name in ("straight", "killed"))
    assert all(torch.equal(a[name], b[name]) for name in a)


# -- 9 to 15 take about 20 minutes


@pytest.mark.parametrize("shape", ["char", "gpt2"])
def test_09_speed(house, record_property, shape):
    """Next to nanoGPT: dev/compare.py. Here the tokens per second, and the peak of memory."""
    settings = CHAR if shape == "char" else GPT2
    for rows in (64,) if shape == "char" else (12, 32):
        sizes = settings | {"batch_size": rows} if ON != "cpu" else BASE | {"batch_size": 2}
        words = [f"--{key}={value}" for key, value in sizes.items()] + ["--dataset=small", "--repeats=3"]
        done = script("bench.py", "--parts=train", "--json", f"--device={ON}", *words, cwd=house)
        found = json.loads(done.out.splitlines()[-1])
        for key in ("tokens_per_second", "mfu"):
            record_property(f"{rows}.{key}", found["train"][key])
        record_property(f"{rows}.peak_memory_bytes", found["peak_memory_bytes"])
        assert found["train"]["tokens_per_second"] > 0
        if ON != "cpu" and shape == "gpt2":
            assert found["train"]["mfu"] > 0.25


@on_cuda
def test_10_the_gpu_does_not_wait_for_python(record_property):
    from torch.profiler import ProfilerActivity, profile

    machine = init_machine(ON)
    step = step_of(CHAR, 64, machine)
    for _ in range(5):
        step()
    synchronize(machine.device)
    began = time.perf_counter()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(5):
            step()
        synchronize(machine.device)
    seconds = time.perf_counter() - began
    busy = sum(event.self_device_time_total for event in profiled.key_averages()) / 1e6
    record_property("idle", idle := 1 - busy / seconds)
    record_property("peak_memory_bytes", peak_memory(machine.device))
    assert idle < 0.3


@on_cuda
@pytest.mark.parametrize("config, steps, most", [("shakespeare_char", 2000, 1.50), ("shakespeare_fast", 2000, 1.46)])
def test_11_recipes_reach_their_loss(tmp_path, shakespeare, record_property, config, steps, most):
    """On a GPU's steps and on a CPU's: the same loss after the same steps."""
    section = ["--max_minutes=0"] if config != "shakespeare_char" else []
    for seed in (1, 2, 3):
        began = time.perf_counter()
        out = f"--out_dir={config}-{seed}"
        script("train.py", f"config/{config}.py", f"--max_iters={steps}", f"--seed={seed}", out, *section, cwd=tmp_path)
        record_property(f"{seed}.seconds", time.perf_counter() - began)
        done = script("evaluate.py", out, "--json", "--dtype=float32", cwd=tmp_path)
        record_property(f"{seed}.loss", loss := json.loads(done.out.splitlines()[-1])["loss"])
        assert loss < most


@on_cuda
def test_12_a_run_by_the_clock_ends_on_time(house, record_property):
    began = time.perf_counter()
    sizes = ["--dataset=small", "--block_size=256", "--batch_size=8", "--max_minutes=2"]
    script("train.py", "config/gpt2.py", *sizes, "--out_dir=clock", cwd=house)
    record_property("seconds", seconds := time.perf_counter() - began)
    assert 110 < seconds < 123


def test_13_other_formats_and_compiled_decoding(house):
    script("train.py", *tiny(max_iters=3), "--out_dir=formats", cwd=house)
    words = ["--out_dir=formats", "--max_new_tokens=40", f"--device={ON}"]
    for extra in (["--quantize=int8"], ["--quantize=int4"], ["--dtype=bfloat16"]):
        assert script("sample.py", *words, *extra, cwd=house).out.strip()
    if ON != "cpu":
        for dtype in ("float32", "bfloat16"):
            assert script("sample.py", *words, "--compile=true", f"--dtype={dtype}", cwd=house).out.strip()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_14_two_gpus_train_as_one(house, record_property):
    settings = tiny(max_iters=50, dropout=0.0, device="cuda", dtype="bfloat16", compile="true", eval_interval=50)
    script("train.py", *settings, "--out_dir=one", cwd=house)
    launcher = ["--nproc_per_node=2", "--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    began = time.perf_counter()
    two = run("train.py", *settings, "--out_dir=two", cwd=house, torchrun=launcher, seconds=600)
    record_property("seconds", time.perf_counter() - began)
    assert two.status == 0, two.output
    one_by_one, together = losses(house / "one"), losses(house / "two")
    assert all(math.isclose(together[step], loss, abs_tol=5e-3) for step, loss in one_by_one.items())
