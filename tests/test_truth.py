"""minutegpt/truth.py: faults planted into each operation are found, named and mended; healthy devices pass."""

import contextlib
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from harness import ROOT, run, tiny
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import model as model_file
from minutegpt import operations, optim, truth
from minutegpt.checkpoint import read_checkpoint
from minutegpt.device import Machine, fast_dropout
from minutegpt.errors import UserError
from minutegpt.operations import Place, attentions, difference, exact_attention, warn_of_cache, whole_model
from minutegpt.optim import make_optimizers
from minutegpt.timing import OPTIMIZER
from model import GPT, CausalSelfAttention, GPTConfig, KVCache, NGrams, causal_attention

BASE = {"block_size": 40, "vocab_size": 65, "n_layer": 2, "n_head": 2, "n_embd": 32}
BLOCKS = {
    "classic": {"dropout": 0.2, "bias": True},
    "post": {"norm_position": "post", "activation": "gelu_tanh"},
    "gqa": {"pos": "rope", "n_kv_head": 1},
    "fast": {
        "pos": "rope", "norm": "rmsnorm", "qk_norm": True, "activation": "relu2", "tie": False,
        "ngram": 6, "ngram_rows": 128,
    },
    "moe": {"n_expert": 32, "ngram": 3},
}  # fmt: skip
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def machine(dtype=torch.float32, compile=False):
    return Machine(torch.device("cpu"), dtype, compile)


def a_model(block="classic", optimizer="muon", dtype=torch.float32):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**BASE | BLOCKS[block]))
    ns_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    return model, make_optimizers(model, OPTIMIZER | {"optimizer": optimizer}, ns_dtype)


def check(block="classic", dtype=torch.float32, optimizer="muon", seed=0):
    """The machine, model and optimizers after the test."""
    (model, optimizers), chosen = a_model(block, optimizer, dtype), machine(dtype)
    truth.check(chosen, model, optimizers, rows=80, seed=seed)
    return chosen, model, optimizers


def attends(model):
    return {module.attend for module in model.modules() if isinstance(module, CausalSelfAttention)}


class Fault(TorchDispatchMode):
    """Makes the results of one of PyTorch's operations wrong by a factor, where they are not float64.

    Of an operation in place, what it changes is wrong by the factor.
    """

    def __init__(self, operation, factor=1.01, dtypes=(torch.float32, torch.bfloat16, torch.float16)):
        super().__init__()
        self.operation, self.factor, self.dtypes, self.met = operation, factor, dtypes, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name != f"aten::{self.operation}":
            return function(*args, **(kwargs or {}))
        changed = args[0] if isinstance(args[0], list | tuple) else [args[0]]
        in_place = self.operation.endswith("_") and changed[0].dtype in self.dtypes
        before = [x.clone() for x in changed] if in_place else []
        result = function(*args, **(kwargs or {}))
        for x, old in zip(changed if in_place else [], before, strict=True):
            x.add_(x - old, alpha=self.factor - 1)
        self.met += in_place
        return result if in_place else torch.utils._pytree.tree_map(self.wrong, result)

    def wrong(self, x):
        if not isinstance(x, torch.Tensor) or x.dtype not in self.dtypes:
            return x
        self.met += 1
        return x * self.factor


class Missing(TorchDispatchMode):
    """A device without GELU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name == "aten::gelu":
            raise NotImplementedError("gelu is not there")
        return function(*args, **(kwargs or {}))


# ---------------------------------------------------------------------------------------- a device that is right


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", BLOCKS)
def test_a_right_device_passes(block, dtype, capsys):
    for seed in range(2):
        chosen, model, optimizers = check(block, dtype, seed=seed)
    assert chosen.dtype == dtype and attends(model) == {causal_attention} and capsys.readouterr().err == ""
    assert optimizers[0].param_groups[0]["fused"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", BLOCKS)
def test_a_right_device_passes_with_any_seed(block, dtype, capsys):
    for seed in range(100):
        check(block, dtype, seed=seed)
    assert capsys.readouterr().err == ""


def test_no_operation_is_left_out_because_it_fails_here(monkeypatch):
    """An operation that raises counts as right, since the training step raises too. None may do so here."""
    found = []
    real = truth._wrong
    monkeypatch.setattr(truth, "_wrong", lambda operations: found.extend(operations) or real(operations))
    for block in BLOCKS:
        check(block)
    for operation in found:
        results, exact = operation.run(), operation.exact()
        assert len(results) == len(exact) >= 1
        for result, right in zip(results, exact, strict=True):
            assert result.shape == right.shape and right.dtype in (torch.float32, torch.float64)
            assert right.abs().sum() > 0 or "whole" in operation.name or "experts" in operation.name
    names = {operation.name for operation in found}
    assert len(names) >= 25 and {"layer norm", "RMS norm", "cross-entropy", "n-gram ids", "Muon's step"} <= names


def test_weights_optimizers_and_random_numbers_are_not_touched():
    torch.manual_seed(5)
    model, optimizers = a_model("fast")
    before = [p.detach().clone() for p in model.parameters()]
    random_state = torch.get_rng_state()
    truth.check(machine(torch.bfloat16), model, optimizers, rows=80)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert not any(optimizer.state for optimizer in optimizers) and all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_run_has_the_same_bits_with_and_without_the_test(data, tmp_path):
    argv = tiny(max_iters=4, optimizer="muon", ngram=3, eval_interval=2)
    for out, setting in (("with", "on"), ("without", "off")):
        env = {"MINUTEGPT_TRUTH": setting}
        done = run("train.py", *argv, f"--out_dir={tmp_path / out}", data=data, cwd=tmp_path, env=env)
        assert done.status == 0, done.err
    one, other = (read_checkpoint(tmp_path / out / "ckpt.pt") for out in ("with", "without"))
    assert all(torch.equal(w, other["model"][name]) for name, w in one["model"].items())
    rows = [[json.loads(line) for line in open(tmp_path / out / "log.jsonl")] for out in ("with", "without")]
    assert [row["train_loss"] for row in rows[0]] == [row["train_loss"] for row in rows[1]]


# ---------------------------------------------------------------------------------------- attention


def wrong_attention(monkeypatch, fault, where=lambda q, k: True):
    real = F.scaled_dot_product_attention

    def attention(q, k, v, **how):
        if q.dtype == torch.float64 or not where(q, k):
            return real(q, k, v, **how)
        return fault(real, q, k, v, how)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)


def groups_of_four(real, q, k, v, how):
    T, S = q.size(2), k.size(2)
    seen = torch.arange(S) <= (torch.arange(S - T, S)[:, None] // 4 * 4 + 3)
    return real(q, k, v, attn_mask=seen, enable_gqa=how["enable_gqa"])


ATTENTION_FAULTS = {
    "sees the future": (lambda real, q, k, v, how: real(q, k, v, **how | {"is_causal": False}), lambda q, k: True),
    "masks per group of four": (groups_of_four, lambda q, k: q.size(2) > 1),
    "1% off": (lambda real, q, k, v, how: real(q, k, v, **how) * 1.01, lambda q, k: True),
    "scores 10% off": (lambda real, q, k, v, how: real(1.1 * q, k, v, **how), lambda q, k: True),
    "wrong at the full context": (lambda real, q, k, v, how: 0 * q, lambda q, k: q.size(2) == 40),
    "one query of several rows": (
        lambda real, q, k, v, how: real(q, k, v, **how).flip(0), lambda q, k: q.size(2) == 1 and len(q) > 1
    ),
    "wrong without gradients": (
        lambda real, q, k, v, how: 1.01 * real(q, k, v, **how), lambda q, k: not torch.is_grad_enabled()
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("block", ["classic", "gqa"])
@pytest.mark.parametrize("name", ATTENTION_FAULTS)
def test_wrong_attention_is_replaced(name, block, dtype, monkeypatch, capsys):
    wrong_attention(monkeypatch, *ATTENTION_FAULTS[name])
    chosen, model, _ = check(block, dtype)
    assert attends(model) == {exact_attention} and chosen.dtype == dtype
    warning = capsys.readouterr().err
    assert "attention" in warning and "plain matrix products" in warning and warning.count("warning") == 1
    with torch.no_grad():
        logits, loss = model.eval()(torch.arange(40)[None], torch.arange(40)[None])
    assert math.isfinite(loss) and logits.shape == (1, 40, 65)
    assert model.generate(torch.zeros(2, 3, dtype=torch.int64), 4).shape == (2, 7)  # with the cache


def test_plain_attention_is_attention():
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    torch.testing.assert_close(exact_attention(q, k, v), causal_attention(q, k, v))
    torch.testing.assert_close(exact_attention(q[:, :, :1], k, v), causal_attention(q[:, :, :1], k, v))


def test_attention_over_a_long_context_is_tested_in_part():
    config, sizes = GPTConfig(block_size=2**16, n_layer=1, n_head=1, n_embd=8), []

    def attend(q, k, v):
        sizes.append((q.size(2), k.size(2)))
        return causal_attention(q, k, v)

    place = Place(torch.device("cpu"), torch.float32, contextlib.nullcontext, False, attend)
    for operation in attentions(config, place):
        operation.run()
    assert max(queries * keys for queries, keys in sizes) == 2048**2  # 65536**2 took minutes in float64
    assert (5, 2**16) in sizes  # the last positions see all others


# ---------------------------------------------------------------------------------------- every other operation

OPERATIONS = [
    # block, PyTorch's operation, part of the name that is told
    ("classic", "mm", "a linear layer"),
    ("classic", "addmm", "a linear layer"),
    ("classic", "native_layer_norm", "layer norm"),
    ("classic", "native_layer_norm_backward", "layer norm"),
    ("classic", "gelu", "gelu"),
    ("classic", "gelu_backward", "gelu"),
    ("post", "gelu", "gelu_tanh"),
    ("classic", "embedding", "an embedding"),
    ("classic", "embedding_dense_backward", "an embedding"),
    ("classic", "_softmax", "softmax"),
    ("classic", "_log_softmax", "cross-entropy"),
    ("classic", "nll_loss_forward", "cross-entropy"),
    ("classic", "nll_loss_backward", "cross-entropy"),
    ("classic", "linalg_vector_norm", "gradient norm"),
    ("fast", "relu", "relu2"),
    ("fast", "cos", "rotary"),
    ("fast", "sin", "rotary"),
    ("fast", "rsqrt", "RMS norm"),
    ("moe", "_grouped_mm", "experts"),
    ("moe", "index_select", "the whole model"),
]


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize(("block", "operation", "name"), OPERATIONS)
@pytest.mark.parametrize("factor", [1.01, 0.5])
def test_a_wrong_operation_is_named_and_refused(factor, block, operation, name, dtype):
    if operation == "index_select" and factor == 1.01 and dtype == torch.bfloat16:
        factor = 1.05  # it only copies: the whole model shows it, where rounding explains more
    with Fault(operation, factor) as fault, pytest.raises(UserError) as error:
        check(block, dtype)
    assert fault.met and name in str(error.value), str(error.value)
    assert "Install another version of PyTorch" in str(error.value)


@pytest.mark.parametrize("factor", [1.01, 2.0])
def test_what_is_wrong_in_half_precision_alone_runs_in_float32(factor, capsys):
    for operation, name in (("mm", "a linear layer"), ("addmm", "a linear layer"), ("gelu", "gelu")):
        with Fault(operation, factor, dtypes=(torch.bfloat16,)):
            chosen, _, optimizers = check("classic", torch.bfloat16)
        assert chosen.dtype == torch.float32 and chosen.reasons["dtype"].startswith("float32")
        assert optimizers[1].ns_dtype == torch.float32
        assert name in capsys.readouterr().err


@pytest.mark.parametrize("factor", [1.01, 3.0])
def test_a_wrong_fused_adamw_is_replaced_by_one_step_after_another(factor, capsys):
    with Fault("_fused_adamw_", factor):
        _, _, optimizers = check(optimizer="adamw")
    assert "AdamW's fused step" in capsys.readouterr().err
    assert not any(group["fused"] or group["foreach"] for group in optimizers[0].param_groups)
    p = optimizers[0].param_groups[0]["params"][0]
    p.grad = torch.ones_like(p)
    optimizers[0].step()
    with Fault("_fused_adamw_", factor), Fault("lerp_", factor), pytest.raises(UserError, match="AdamW's step"):
        check(optimizer="adamw")


@pytest.mark.parametrize("operation", ["_foreach_lerp_", "_foreach_addcmul_", "_foreach_addcdiv_"])
def test_a_wrong_adamw_of_several_tensors_is_refused(operation):
    model, optimizers = a_model(optimizer="adamw")
    for group in optimizers[0].param_groups:
        group |= {"fused": False, "foreach": True}  # what a device without the fused kernel has
    with Fault(operation), pytest.raises(UserError, match="AdamW's step"):
        truth.check(machine(), model, optimizers, rows=80)


def test_wrong_newton_schulz_steps(monkeypatch, capsys):
    real = optim.orthogonalize
    for factor in (1.01, 0.2):  # in bfloat16 rounding explains 1%
        wrong = lambda g, factor=factor: real(g) * (1 if g.dtype == torch.float64 else factor)  # noqa: E731
        monkeypatch.setattr(optim, "orthogonalize", wrong)
        with pytest.raises(UserError, match="Muon's step"):
            check()
        wrong = lambda g, factor=factor: real(g) * (factor - 0.05 if g.dtype == torch.bfloat16 else 1)  # noqa: E731
        monkeypatch.setattr(optim, "orthogonalize", wrong)
        chosen, _, optimizers = check(dtype=torch.bfloat16)
        assert chosen.dtype == torch.bfloat16 and optimizers[1].ns_dtype == torch.float32
        assert "Muon in float32" in capsys.readouterr().err


def test_wrong_integers_and_a_wrong_cache(monkeypatch):
    class Remainder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            off = function._schema.name == "aten::remainder" and result.dtype == torch.int64 and result.numel() > 40
            return torch.where(result > 40, result - 1, result) if off and not elsewhere else result

    @contextlib.contextmanager
    def on_the_cpu():
        elsewhere.append(True)
        with operations.InFloat64():
            yield
        elsewhere.clear()

    elsewhere = []
    monkeypatch.setattr(truth, "InFloat64", on_the_cpu)
    with Remainder(), pytest.raises(UserError, match="n-gram ids"):
        check("fast")
    real = KVCache.append
    wrong = lambda self, layer, k, v: real(self, layer, k * (1 if k.dtype == torch.float64 else 1.1), v)  # noqa: E731
    monkeypatch.setattr(KVCache, "append", wrong)
    with pytest.raises(UserError, match="the whole model"):
        check("classic")


def test_an_edit_that_the_cache_does_not_know_is_not_blamed_on_the_device(monkeypatch, capsys):
    """A learner adds the position before to each input of attention: right without a cache, wrong with one."""
    check("fast")
    assert "KV cache" not in capsys.readouterr().err
    forward = CausalSelfAttention.forward

    def shifted(self, x, rotation, cache):
        return forward(self, x + 0.5 * F.pad(x, (0, 0, 1, 0))[:, :-1], rotation, cache)

    monkeypatch.setattr(CausalSelfAttention, "forward", shifted)
    warn_of_cache.cache_clear()
    check("fast")  # refuses nothing
    errors = capsys.readouterr().err
    assert errors.count("with the KV cache, model.py computes other logits than without it") == 1
    assert "computes wrong" not in errors


ATTEND, NGRAMS, ORTHOGONALIZE = CausalSelfAttention.attend, NGrams.forward, optim.orthogonalize
ROTARY = operations.rotary
EDITS = {
    "rotation": ("fast", (operations, "rotary", lambda *a: ROTARY(*a) * torch.tensor([1.0, -1.0])[:, None, None])),
    "window": ("classic", (CausalSelfAttention, "attend", staticmethod(lambda q, k, v: windowed(q, k, v)))),
    "scale": ("gqa", (CausalSelfAttention, "attend", staticmethod(lambda q, k, v: ATTEND(1.5 * q, k, v)))),
    "activation": ("classic", (model_file.ACTIVATIONS, ("gelu",), F.silu)),
    "another hash": ("fast", (NGrams, "forward", lambda self, idx: NGRAMS(self, 3 * idx))),
    "Newton-Schulz": ("fast", (optim, "orthogonalize", lambda g: 0.8 * ORTHOGONALIZE(g))),
}


def windowed(q, k, v):
    """Each position sees itself and the three before it."""
    T, S = q.size(2), k.size(2)
    past = torch.arange(S - T, S)[:, None] - torch.arange(S)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(past >= 0) & (past < 4), enable_gqa=True)


@pytest.mark.parametrize(("block", "edit"), EDITS.values(), ids=EDITS.keys())
def test_an_edit_of_the_code_is_not_blamed_on_the_device(block, edit, monkeypatch, capsys):
    """A learner who tries another attention or rotation gets it, and not the one that was before."""
    place, name, value = edit
    monkeypatch.setattr(place, name, value) if isinstance(name, str) else monkeypatch.setitem(place, *name, value)
    for dtype in DTYPES[:2]:
        chosen, model, _ = check(block, dtype)
        assert chosen.dtype == dtype and exact_attention not in attends(model)
    assert capsys.readouterr().err == ""


def test_the_test_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("MINUTEGPT_TRUTH", "off")
    with Fault("mm", 0.5):
        check()


# ---------------------------------------------------------------------------------------- compiled


def compiled(model, fault=""):
    """The model, by a compiler whose code is wrong by 1% for one function."""

    def backend(graph, inputs):
        for node in [node for node in graph.graph.nodes if getattr(node.target, "__name__", node.target) == fault]:
            with graph.graph.inserting_after(node):
                wrong = graph.graph.call_function(torch.mul, (node, 1.01))
                node.replace_all_uses_with(wrong, delete_user_cb=lambda user, wrong=wrong: user is not wrong)
        graph.recompile()
        return graph

    torch._dynamo.reset()
    return torch.compile(model, backend=backend)


KERNELS = {
    "classic": ("layer_norm", "gelu", "cross_entropy"),
    "fast": ("linear", "scaled_dot_product_attention", "rms_norm"),
}


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("block", BLOCKS)
def test_a_wrong_compiled_kernel_is_found(block, dtype):
    model, _ = a_model(block)
    with torch.no_grad():
        for p in model.parameters():  # as after some training
            p.add_(torch.randn_like(p), alpha=0.05)
    fast_dropout(model)
    batch = torch.randint(65, (4, 40)), torch.randint(65, (4, 40))
    chosen, before = machine(dtype, compile=True), torch.get_rng_state()
    assert truth.compiled_error(chosen, model, [], compiled(model), batch) == ""
    assert torch.equal(torch.get_rng_state(), before) and all(p.grad is None for p in model.parameters())
    for name in KERNELS.get(block, ()):
        assert "computes wrong" in truth.compiled_error(chosen, model, [], compiled(model, name), batch), name


def test_wrong_compiled_newton_schulz_steps_are_found():
    for dtype in DTYPES[:2]:
        (model, optimizers), batch = a_model(dtype=dtype), (torch.randint(65, (2, 40)), torch.randint(65, (2, 40)))
        for factor, wrong in ((1.0, False), (1.05, True)):
            optimizers[1].orthogonalize = lambda g, factor=factor: factor * optim.orthogonalize(g)
            found = truth.compiled_error(machine(dtype, compile=True), model, optimizers, model, batch)
            assert ("Newton-Schulz" in found) == wrong, found


def test_a_wrong_compiler_is_left_out_of_a_run(data, tmp_path):
    (tmp_path / "half.py").write_text(
        "import runpy, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        f"sys.argv[0] = {str(ROOT / 'train.py')!r}\n"
        "import torch\n"
        "from minutegpt import setup\n"
        "class Half(torch.nn.Module):\n"
        "    def __init__(self, model):\n        super().__init__(); self.model = model\n"
        "    def forward(self, x, y):\n        logits, loss = self.model(x, y); return logits, loss * 0.98\n"
        "torch.compile = lambda model, **how: Half(model)\n"
        "setup.expected_minutes = lambda config: 60  # long enough to compile\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    argv = [*tiny(max_iters=2, compile="auto"), f"--out_dir={tmp_path / 'run'}"]
    done = run(tmp_path / "half.py", *argv, data=data, cwd=tmp_path, fork=False)
    card = " ".join(done.out.split())
    assert done.status == 0 and "compile off: it fails here (it computes wrong: the loss)" in card, done.output


# ---------------------------------------------------------------------------------------- sample.py and evaluate.py


def test_what_is_right_is_remembered(monkeypatch, tmp_path):
    monkeypatch.setenv("MINUTEGPT_CACHE", str(tmp_path / "cache"))
    tested = []
    real = truth._wrong
    monkeypatch.setattr(truth, "_wrong", lambda operations: tested.append(1) or real(operations))
    model = a_model()[0].eval()

    def times(machine, narrow=False):
        tested.clear()
        truth.check_once(machine, model, narrow)
        return len(tested)

    assert [times(machine()), times(machine()), times(machine())] == [1, 0, 0]
    assert [times(machine(torch.bfloat16)), times(machine(torch.bfloat16), narrow=True)] == [1, 1]
    assert [times(machine(torch.bfloat16)), times(machine(torch.bfloat16), narrow=True), times(machine())] == [0, 0, 0]
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert [times(machine()), times(machine())] == [1, 0]
    [file] = (tmp_path / "cache").iterdir()
    for broken in ("", "{", "[1, 2", "3", "null", "[" * 100_000, "\x00\xff"):
        file.write_text(broken, encoding="latin-1")
        assert [times(machine()), times(machine())] == [1, 0]
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MINUTEGPT_CACHE", str(tmp_path / "file"))  # no folder can be made there
    assert [times(machine()), times(machine())] == [1, 1]


def test_what_was_not_tested_is_not_remembered(monkeypatch, tmp_path):
    monkeypatch.setenv("MINUTEGPT_CACHE", str(tmp_path))
    model = a_model()[0].eval()
    monkeypatch.setenv("MINUTEGPT_TRUTH", "off")
    truth.check_once(machine(), model)
    monkeypatch.delenv("MINUTEGPT_TRUTH")
    with Missing():
        truth.check_once(machine(), model)
    assert not [*tmp_path.iterdir()]
    truth.check_once(machine(), model)
    [file] = tmp_path.iterdir()
    before = file.read_text()
    edited = tmp_path / "edited"
    edited.mkdir()
    (edited / "model.py").write_text("# edited")
    monkeypatch.setattr(truth, "ROOT", edited)
    truth.check_once(machine(), model)
    assert len(json.loads(file.read_text())) == 1 + len(json.loads(before)), "an edit of model.py is tested again"


def test_a_context_of_one_token_can_be_tested():
    config = GPTConfig(block_size=1, vocab_size=9, n_layer=1, n_head=1, n_embd=8, ngram=3)
    place = Place(torch.device("cpu"), torch.float32, contextlib.nullcontext, False, causal_attention)
    operation = whole_model(config, place)
    assert max(difference(operation.run(), operation.exact(), operation)) <= 1


def test_what_is_wrong_is_mended_each_time(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("MINUTEGPT_CACHE", str(tmp_path))
    wrong_attention(monkeypatch, groups_of_four, lambda q, k: q.dtype == torch.bfloat16 and q.size(2) > 1)
    for _ in range(2):
        model, _ = a_model()
        chosen = machine(torch.bfloat16)
        truth.check_once(chosen, model, narrow=True)
        assert attends(model) == {exact_attention} and "plain matrix products" in capsys.readouterr().err
    with Fault("gelu", dtypes=(torch.bfloat16,)):
        truth.check_once(chosen, model, narrow=True)
    assert chosen.dtype == torch.float32


@pytest.mark.slow
def test_all_ranks_replace_what_is_wrong_on_one():
    code = (
        "import torch, minutegpt.truth as truth, sys; sys.path.insert(0, 'tests'); import test_truth as t;"
        "from minutegpt.device import init_machine; import torch.distributed as dist, contextlib, os;"
        "m = init_machine('cpu', 'bfloat16', 'false'); model, optimizers = t.a_model('fast', 'muon', torch.bfloat16)\n"
        "with t.Fault('relu', dtypes=(torch.bfloat16,)) if m.rank else contextlib.nullcontext():\n"
        "    truth.check(m, model, optimizers, rows=80)\n"
        "print(m.rank, m.dtype, optimizers[1].ns_dtype); dist.destroy_process_group()"
    )
    env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29617", "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=env | {"RANK": str(rank)},
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]  # fmt: skip
    told = [process.communicate(timeout=120) for process in started]
    assert [out.strip() for out, _ in told] == [f"{rank} torch.float32 torch.float32" for rank in range(2)]
    assert told[0][1].count("warning: ") == 1 and "relu2" in told[0][1] and "warning: wrong" not in told[1][1]
