"""The training step as a GPU meets it: what is compiled, how many launches and collectives it makes. Needs no GPU.

Fake CUDA tensors go through PyTorch's real dispatcher, which chooses the kernels. They compute nothing.
"""

import collections
import os

import pytest
import torch
from functorch.compile import make_boxed_func
from harness import ROOT, optimizers_of, start_ranks, tiny
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses import fake_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from minutegpt.device import ForTraining, Machine, PaddedLinear, pad_head
from minutegpt.generate import hide_padding
from minutegpt.optim import orthogonalize
from model import GPT, GPTConfig

SMALL = {"block_size": 16, "vocab_size": 37, "n_layer": 2, "n_head": 2, "n_embd": 32}
FAST = {"pos": "rope", "norm": "rmsnorm", "qk_norm": True, "activation": "relu2", "tie": False}
ATEN = torch.ops.aten


def batch(V: int = 37, B: int = 3, T: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(V, (B, T + 1), generator=torch.Generator().manual_seed(0))
    return tokens[:, :-1], tokens[:, 1:]


@pytest.fixture
def graphs(monkeypatch):
    """compiled(module) -> (forward graph, backward graph) of one step, as torch.compile hands them to its backend."""

    def compiled(module: torch.nn.Module) -> list[torch.fx.GraphModule]:
        found: list[torch.fx.GraphModule] = []

        def keep(graph, example_inputs):
            found.append(graph)
            return make_boxed_func(graph.forward)

        torch._dynamo.reset()
        step = torch.compile(module, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep), fullgraph=True)
        step(*batch())[1].backward()
        assert len(found) == 2
        return found

    yield compiled
    torch._dynamo.reset()


def tangents(backward: torch.fx.GraphModule) -> list[int]:
    """The number of dimensions of each gradient that the backward pass starts from."""
    inputs = [node for node in backward.graph.nodes if node.op == "placeholder" and "tangents" in node.name]
    return [node.meta["val"].ndim for node in inputs]


# -- what is compiled


@pytest.mark.parametrize("settings", [{}, FAST, {"n_expert": 4}])
def test_a_compiled_step_returns_the_loss_alone(graphs, settings):
    """Logits that it returned would cost a gradient of zeros in their size (PyTorch issue 131794)."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SMALL | settings))
    _, backward = graphs(ForTraining(model, logits=False))
    assert tangents(backward) == [0]
    if not settings:  # the test finds what it looks for
        _, backward = graphs(ForTraining(model, logits=True))
        assert sorted(tangents(backward)) == [0, 3]


def test_training_gets_the_same_loss_and_logits_only_where_asked():
    model = GPT(GPTConfig(**SMALL))
    expected, loss = model(*batch())
    machine = Machine(torch.device("cpu"), torch.float32, False)
    assert machine.wrap(model)(*batch())[0] is None
    assert torch.equal(machine.wrap(model)(*batch())[1], loss)
    assert torch.equal(machine.wrap(model, logits=True)(*batch())[0], expected)


def test_a_compiled_step_computes_no_rotation(graphs):
    """The angles come from a table: no cosine, sine or power is left in a layer."""
    for graph in graphs(ForTraining(GPT(GPTConfig(**SMALL | FAST)), logits=False)):
        called = {node.target for node in graph.graph.nodes if node.op == "call_function"}
        assert not called & {ATEN.cos.default, ATEN.sin.default, ATEN.pow.Scalar}
        assert called & {ATEN.mm.default, ATEN.addmm.default}


# -- the padded output layer


@pytest.mark.parametrize("tie", [True, False])
def test_a_padded_output_layer_computes_the_same(monkeypatch, tie):
    torch.manual_seed(0)
    plain, padded = (GPT(GPTConfig(**SMALL | {"tie": tie})).double() for _ in range(2))
    padded.load_state_dict(plain.state_dict())
    monkeypatch.setattr("minutegpt.device.PADDED", ("cpu",))
    pad_head(padded)
    assert type(padded.lm_head) is PaddedLinear and list(padded.state_dict()) == list(plain.state_dict())
    assert (padded.lm_head.weight is padded.transformer.wte.weight) == tie
    for model in (plain, padded):
        model(*batch())[1].backward()
    (expected, loss), (logits, padded_loss) = plain(*batch()), padded(*batch())
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(padded_loss, loss)
    for p, q in zip(plain.parameters(), padded.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad)
    with hide_padding(padded, type("Tokenizer", (), {"vocab_size": 30})):  # ids without text are cut as before
        assert padded(batch()[0])[0].shape[-1] == 30


def test_the_output_layer_is_padded_on_a_gpu_alone(monkeypatch):
    model = GPT(GPTConfig(**SMALL))
    pad_head(model)
    assert type(model.lm_head) is torch.nn.Linear
    monkeypatch.setattr("minutegpt.device.PADDED", ("cpu",))
    round_number = GPT(GPTConfig(**SMALL | {"vocab_size": 128}))
    pad_head(round_number)
    assert type(round_number.lm_head) is torch.nn.Linear


# -- launches


# views, allocations, and questions: no launches
NO_LAUNCH = {"view", "transpose", "t", "detach", "unbind", "slice", "select", "expand", "unsqueeze", "permute", "alias",
             "_unsafe_view", "as_strided", "squeeze", "empty_like", "empty", "new_empty", "empty_strided", "split",
             "split_with_sizes", "device", "_record_function_enter_new", "_record_function_exit"}  # fmt: skip


class Launches(TorchDispatchMode):
    """Counts the operations that are a kernel launch each."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.split("::")[1]
        self.counts[name] += name not in NO_LAUNCH
        return function(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        return sum(self.counts.values())


STEPS = {
    "char": ({"block_size": 256, "vocab_size": 65, "n_layer": 6, "n_head": 6, "n_embd": 384}, "adamw"),
    "fast": (FAST | {"block_size": 256, "vocab_size": 65, "n_layer": 4, "n_head": 3, "n_embd": 192, "ngram": 6,
                     "ngram_rows": 16384}, "muon"),
    "gpt2": ({"block_size": 1024, "vocab_size": 50257, "n_layer": 12, "n_head": 12, "n_embd": 768, "bias": True},
             "adamw"),
}  # fmt: skip
# the launches of an uncompiled step: forward, AdamW, Muon. More of them slow a GPU that waits for Python
MOST = {"char": (155, 4, 0), "fast": (215, 4, 220), "gpt2": (300, 4, 0)}


@pytest.mark.parametrize("name", STEPS)
def test_the_launches_of_a_step_do_not_grow(monkeypatch, name):
    monkeypatch.setattr(fake_tensor, "init_gpu_context", lambda device: None)  # there is none
    settings, optimizer = STEPS[name]
    with fake_tensor.FakeTensorMode():
        with torch.device("cuda"):
            model = GPT(GPTConfig(**settings))
        train_model = Machine(torch.device("cuda"), torch.bfloat16, False).wrap(model)
        assert isinstance(model.lm_head, PaddedLinear)
        optimizers = optimizers_of(model, optimizer, torch.bfloat16)
        idx = torch.zeros(2, settings["block_size"], dtype=torch.int64, device="cuda")
        counts = []
        with Launches() as launches:
            train_model(idx, idx)
        counts.append(launches.total)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        for each in optimizers:
            each.step()  # makes its state
            with Launches() as launches:
                each.step()
            counts.append(launches.total)
    found = tuple(counts + [0] * (3 - len(counts)))
    assert all(0.8 * most <= count <= most for count, most in zip(found, MOST[name], strict=True)), found


def test_compiled_newton_schulz_steps_are_the_same(graphs):
    """On a GPU the step has these graphs: products, and the sums between them, which inductor fuses."""
    x = torch.randn(3, 16, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    step = torch.compile(orthogonalize, dynamic=False, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(step(x), orthogonalize(x))
    model = GPT(GPTConfig(**SMALL))
    assert optimizers_of(model, "muon")[1].orthogonalize is orthogonalize
    assert Machine(torch.device("cuda"), torch.bfloat16, True).compile_muon
    assert not Machine(torch.device("cuda"), torch.bfloat16, False).compile_muon
    assert not Machine(torch.device("cpu"), torch.float32, True).compile_muon


# -- several processes

COUNTED = f"""
import os, runpy, sys
sys.path.insert(0, {str(ROOT)!r})
sys.argv[0] = {str(ROOT / "train.py")!r}
import minutegpt.errors, minutegpt.optim
import torch.distributed as dist
from minutegpt.data.dataset import Split
calls = []
windows = Split.windows
def read(*args):
    calls.append("windows")
    return windows(*args)
Split.windows = read
def counted(name):
    real = getattr(dist, name)
    def call(*args, **kwargs):
        calls.append(name)
        return real(*args, **kwargs)
    setattr(dist, name, call)
for name in ("all_reduce", "broadcast", "broadcast_object_list", "all_gather", "reduce", "barrier"):
    counted(name)
real = minutegpt.optim.set_lr
def set_lr(*args):
    with open("calls-" + os.environ["RANK"], "a") as file:
        file.write(" ".join(calls) + "\\n")
    calls.clear()
    real(*args)
minutegpt.optim.set_lr = set_lr
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.skipif(os.name == "nt", reason="needs gloo")
@pytest.mark.parametrize("clock", [{"max_iters": 6}, {"max_minutes": 0.2}])
def test_a_step_of_several_processes_has_one_collective(house, clock):
    """The clock and the signal to stop travel with the loss. DDP's own, of the gradients, are not counted here.

    The read after it is that of the next step's first batch, while the device works.
    """
    (house / "counted.py").write_text(COUNTED, encoding="utf-8")
    settings = tiny(**{"eval_interval": 10**6, "gradient_accumulation_steps": 4, **clock})
    runs = start_ranks(house, 2, *settings, "--out_dir=counted", "--overwrite", script=house / "counted.py")
    assert [run.wait() for run in runs] == [0, 0], runs[0].output + runs[1].output
    for rank in range(2):
        steps = (house / f"calls-{rank}").read_text().splitlines()
        assert len(steps) > 8 and set(steps[-4:]) == {"windows all_reduce windows"}, steps[-6:]
        (house / f"calls-{rank}").unlink()


FAILING = f"""
import os, runpy, sys
sys.path.insert(0, {str(ROOT)!r})
sys.argv[0] = {str(ROOT / "train.py")!r}
import minutegpt.errors, torch
from minutegpt import setup
def compile(module, **options):
    def broken(*args):
        raise RuntimeError("no compiler here")
    class Broken(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = module
        def forward(self, *args):
            if os.environ["RANK"] == "1" and stance == "default":
                broken()
            return self.inner(*args)
    return Broken()
stance = "default"
def set_stance(value):
    global stance
    stance = value
torch.compile, torch.compiler.set_stance = compile, set_stance
setup.expected_minutes = lambda config: 60  # long enough to compile
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.skipif(os.name == "nt", reason="needs gloo")
def test_a_compiler_that_fails_on_one_process_is_left_out_on_all(house):
    (house / "failing.py").write_text(FAILING, encoding="utf-8")
    settings = [*tiny(max_iters=2), "--compile=auto", "--out_dir=failing"]
    runs = start_ranks(house, 2, *settings, script=house / "failing.py")
    assert [run.wait(120) for run in runs] == [0, 0], runs[0].output + runs[1].output
    assert "it fails here (on another process)" in runs[0].output
