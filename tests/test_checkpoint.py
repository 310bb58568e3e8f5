"""minutegpt/checkpoint.py: no fault leaves a run unreadable, and none is taken for what it is not."""

import copy
import errno
import itertools
import os
import random
import time
import zipfile
from collections import OrderedDict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import harmless, in_a_fork, linux, optimizers_of

from minutegpt import checkpoint, files
from minutegpt.checkpoint import (
    Damaged,
    build_model,
    load_optimizers,
    load_run,
    read_checkpoint,
    save,
    save_checkpoint_file,
)
from minutegpt.errors import UserError
from model import GPT, GPTConfig

posix = pytest.mark.skipif(os.name == "nt", reason="POSIX only")
CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=11)


def make_state(shape=CONFIG, step=3, **more):
    torch.manual_seed(0)
    return {
        "model": GPT(shape).state_dict(),
        "model_config": asdict(shape),
        "optimizer": {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(4, 4)}}, "betas": (0.9, 0.95)},
        "step": step,
        "seconds": 1.5,
        "best_val_loss": float("inf"),
        "config": {"out_dir": "out", "n_layer": 2, "learning_rate": 1e-3, "compile": False},
        "tokenizer": {"kind": "byte"},
        "environment": {"torch": "2", "device": "cpu"},
        "rng": torch.get_rng_state(),
        "scaler": None,
    } | more


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


# what is saved comes back


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_state_comes_back_bit_for_bit(tmp_path, dtype):
    state = make_state()
    state["model"] = {name: weight.to(dtype) for name, weight in state["model"].items()}
    save(tmp_path, state)
    back = load_run(tmp_path)
    extra = {"format": "minutegpt", "version": 1, "nanogpt": False}
    assert same(back, dict(state, model=dict(state["model"])) | extra)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt.pt"]


def test_the_two_last_and_the_best_are_kept(tmp_path):
    for step, best in [(1, True), (2, True), (3, False), (4, False)]:
        save(tmp_path, make_state(step=step), best=best)
    assert [read_checkpoint(tmp_path / name)["step"] for name in ("ckpt.pt", "ckpt-prev.pt", "ckpt-best.pt")] == [
        4,
        3,
        2,
    ]
    assert (load_run(tmp_path)["step"], load_run(tmp_path, "best")["step"]) == (4, 2)
    assert len(list(tmp_path.iterdir())) == 3


def test_best_is_the_latest_where_there_is_no_best(tmp_path):
    save(tmp_path, make_state(step=7))
    assert load_run(tmp_path, "best")["step"] == 7


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"bias": True},
        {"tie": False},
        {"pos": "rope", "norm": "rmsnorm", "qk_norm": True, "activation": "relu2", "n_kv_head": 1},
        {"norm_position": "post"},
    ],
)
def test_a_model_comes_back_with_its_logits(tmp_path, settings):
    config = GPTConfig(**asdict(CONFIG) | settings)
    model = GPT(config).eval()
    save(tmp_path, make_state(config, model=model.state_dict()))
    again = build_model(load_run(tmp_path)).eval()
    idx = torch.arange(8)[None] % 11
    assert torch.equal(model(idx)[0], again(idx)[0])
    assert again.config == config


def test_the_size_told_is_the_size_on_disk(tmp_path):
    state = make_state(model={"a": torch.zeros(1000, 1000)})
    save_checkpoint_file(tmp_path / "a.pt", state)
    assert abs((tmp_path / "a.pt").stat().st_size - checkpoint.size(state)) < 20_000


def test_what_could_not_be_read_back_is_not_written(tmp_path):
    state = make_state(environment={"torch": torch.__version__}, config={"x": np.float64(1.5)})
    save_checkpoint_file(tmp_path / "a.pt", state)  # these only call themselves a text and a number: they become one
    back = read_checkpoint(tmp_path / "a.pt")
    assert type(back["environment"]["torch"]) is str and type(back["config"]["x"]) is float
    for value in (np.float32(1), Path("a"), {1, 2}, b"x", torch.float32, 2**64, torch.nn.Parameter(torch.zeros(1))):
        with pytest.raises(ValueError, match="it holds a"):
            save_checkpoint_file(tmp_path / "a.pt", make_state(config={"x": value}))
    assert same(read_checkpoint(tmp_path / "a.pt"), back)  # and what stood there still does


@pytest.mark.parametrize(
    "change", ["moments of another shape", "one parameter less", "a number", "nothing", "one optimizer less"]
)
def test_an_optimizer_that_does_not_fit_is_told(change):
    model = GPT(CONFIG)
    optimizers = optimizers_of(model, "muon")
    model(torch.zeros(1, 8, dtype=torch.long), torch.zeros(1, 8, dtype=torch.long))[1].backward()
    for optimizer in optimizers:
        optimizer.step()
    saved = copy.deepcopy([optimizer.state_dict() for optimizer in optimizers])
    load_optimizers(optimizers_of(model, "muon"), {"optimizer": saved})
    if change == "moments of another shape":
        saved[0]["state"][0]["exp_avg"] = torch.zeros(3)
    elif change == "one parameter less":
        saved[0]["param_groups"][0]["params"].pop()
    elif change == "a number":
        saved[0]["state"][0] = 3
    elif change == "one optimizer less":
        saved.pop()
    else:
        saved = None
    with pytest.raises(UserError, match="optimizer does not fit the model"):
        load_optimizers(optimizers_of(model, "muon"), {"optimizer": saved})


# nanoGPT's checkpoints: the format written by hand, with random weights


def nanogpt_state(prefix="", masks=False):
    state = make_state()
    weights = OrderedDict((prefix + name, weight) for name, weight in state["model"].items())
    if masks:
        weights[prefix + "transformer.h.0.attn.bias"] = torch.ones(1, 1, 8, 8).tril()
    arguments = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 8, "bias": False, "vocab_size": 11}
    return {
        "model": weights,
        "optimizer": {"state": {}, "param_groups": [{"betas": (0.9, 0.95), "lr": 1e-3, "params": [0]}]},
        "model_args": arguments | {"dropout": 0.2},
        "iter_num": 250,
        "best_val_loss": torch.tensor(1.5),
        "config": {"dataset": "shakespeare_char", "eval_iters": 200, "compile": False},
    }


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
@pytest.mark.parametrize("masks", [False, True])
def test_a_nanogpt_checkpoint_is_recognised(tmp_path, prefix, masks):
    torch.save(nanogpt_state(prefix, masks), tmp_path / "ckpt.pt")
    state = load_run(tmp_path, "best")
    assert (state["nanogpt"], state["step"], state["tokenizer"], state["best_val_loss"]) == (True, 250, None, 1.5)
    assert state["config"]["dataset"] == "shakespeare_char"
    model = build_model(state)
    assert model.config.dropout == 0.2 and model.config.activation == "gelu" and model.config.pos == "learned"
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, make_state()["model"][name])


# faults: no fault leaves a run unreadable


def test_a_damaged_latest_falls_back_to_the_one_before_and_says_so(tmp_path, capsys):
    for step in (1, 2):
        save(tmp_path, make_state(step=step))
    data = bytearray((tmp_path / "ckpt.pt").read_bytes())
    data[len(data) // 2] ^= 1  # one bit of a weight: only the checksum can tell
    (tmp_path / "ckpt.pt").write_bytes(data)
    assert load_run(tmp_path)["step"] == 1
    said = capsys.readouterr().err
    assert "warning: " in said and "ckpt.pt is damaged" in said and "checksum" in said
    assert "Taking ckpt-prev.pt instead" in said
    (tmp_path / "ckpt-prev.pt").write_bytes(b"")
    with pytest.raises(UserError, match=r"ckpt-prev\.pt is damaged"):
        load_run(tmp_path)


def test_the_next_save_after_a_damaged_latest_never_leaves_fewer_than_one_good(tmp_path, monkeypatch):
    for step in (1, 2):
        save(tmp_path, make_state(step=step))
    (tmp_path / "ckpt.pt").write_bytes(b"torn")
    monkeypatch.setattr(checkpoint, "save_checkpoint_file", lambda *args: (_ for _ in ()).throw(UserError("no space")))
    with pytest.raises(UserError, match="no space"):
        save(tmp_path, make_state(step=3))
    assert load_run(tmp_path)["step"] == 1  # the torn one did not take the good one's place


def test_no_checkpoint(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"no checkpoint in .*python train\.py --out_dir="):
            load_run(folder)
    with pytest.raises(UserError, match="--ckpt=best or --ckpt=latest"):
        load_run(tmp_path, "../../etc/passwd")


class Faulty:
    """Stands in for the files and calls of minutegpt.files: at the n-th operation the process dies or errs."""

    def __init__(self, at, fault):
        self.at, self.fault, self.count = at, fault, 0

    def operation(self, call, *args, **kwargs):
        self.count += 1
        if self.count != self.at:
            return call(*args, **kwargs)
        if self.fault == "half" and args and isinstance(args[0], bytes | memoryview):
            call(args[0][: len(args[0]) // 2])
        if self.fault == "after":
            call(*args, **kwargs)
        if self.fault == "error":
            raise OSError(random.choice([errno.ENOSPC, errno.EIO, errno.EACCES]), "injected")
        os._exit(9)  # as SIGKILL would: nothing is cleaned up

    def open(self, path, mode):
        return FaultyFile(self, open(path, mode, buffering=0))  # unbuffered: each write reaches the disk

    def install(self):
        files.open = self.open
        for name in ("replace", "link", "fsync", "open", "unlink"):
            real = getattr(os, name)
            setattr(os, name, lambda *args, real=real, **kwargs: self.operation(real, *args, **kwargs))


class FaultyFile:
    def __init__(self, faulty, file):
        self.faulty, self.file, self.fileno = faulty, file, file.fileno

    def write(self, data):
        return self.faulty.operation(self.file.write, data)

    def flush(self):
        self.faulty.operation(self.file.flush)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()


def every_fault(tmp_path, monkeypatch, bests, faults):
    """A save with a fault at each of its operations in turn; the number of runs. Whatever happens, a run is left."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # waiting for the disk shows nothing here
    tiny = {"model": {"a": torch.arange(5.0)}, "model_config": {}, "config": {}}
    for step, loss in [(1, 3.0), (2, 2.0)]:
        save(tmp_path, tiny | {"step": step, "best_val_loss": loss}, best=True)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    runs, outcomes = 0, set()
    for best, fault in itertools.product(bests, faults):
        for at in itertools.count(1):
            out = tmp_path / f"{best}-{fault}-{at}"
            out.mkdir()
            for name, data in before.items():
                (out / name).write_bytes(data)

            def faulty_save(at=at, fault=fault, out=out, best=best):
                faulty = Faulty(at, fault)
                faulty.install()
                save(out, tiny | {"step": 3, "best_val_loss": 1.0 if best else 2.0}, best=best)
                return 0 if faulty.count >= at else 5  # 5: this save has fewer operations than that

            status = in_a_fork(faulty_save)
            if status == 5:
                break
            runs += 1
            assert status in (0, 2, 9), f"operation {at}, {fault}: exit status {status}"  # no traceback
            latest, best_one = load_run(out), load_run(out, "best")
            outcomes.add((status, latest["step"]))
            assert latest["step"] in (2, 3) and best_one["step"] in (2, 3)
            assert best_one["best_val_loss"] <= latest["best_val_loss"]  # or a resume would never save it again
            assert read_checkpoint(out / "ckpt.pt")["step"] == latest["step"]  # ckpt.pt itself is never missing or torn
            files.run_lock(out).close()  # what the next run does first
            save(out, tiny | {"step": 4})
            assert load_run(out)["step"] == 4 and read_checkpoint(out / "ckpt-prev.pt")["step"] == latest["step"]
            assert {path.name for path in out.iterdir()} == {".lock", "ckpt.pt", "ckpt-prev.pt", "ckpt-best.pt"}
    assert {(9, 2), (9, 3)} <= outcomes  # deaths on both sides of the rename
    return runs


@posix
def test_a_kill_at_every_write_flush_and_rename_leaves_a_readable_run(tmp_path, monkeypatch):
    assert every_fault(tmp_path, monkeypatch, [True], ["half"]) >= 50


@posix
@pytest.mark.slow
def test_any_fault_at_every_write_flush_and_rename_leaves_a_readable_run(tmp_path, monkeypatch):
    assert every_fault(tmp_path, monkeypatch, [False, True], ["before", "after", "half", "error"]) >= 200


@posix
@pytest.mark.parametrize("fault", ["before", "after", "half", "error"])
def test_a_run_that_is_replaced_is_whole_until_the_new_one_has_a_checkpoint(tmp_path, monkeypatch, fault):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    tiny = {"model": {"a": torch.arange(5.0)}, "model_config": {}, "config": {}}
    new = tiny | {"step": 0, "evaluated": -1, "best_val_loss": float("inf")}
    outcomes = set()
    for at in itertools.count(1):
        out = tmp_path / str(at)
        out.mkdir()
        for step in (1, 2):
            save(out, tiny | {"step": step, "best_val_loss": 1.0 / step}, best=True)
        before = {path.name: path.read_bytes() for path in out.iterdir()}

        def faulty_save(at=at, out=out):
            faulty = Faulty(at, fault)
            faulty.install()
            save(out, new)
            return 0 if faulty.count >= at else 5

        if in_a_fork(faulty_save) == 5:
            break
        step = read_checkpoint(out / "ckpt.pt")["step"]
        outcomes.add(step)
        if step == 2:
            assert {name: (out / name).read_bytes() for name in before} == before
        files.run_lock(out).close()
        save(out, new)
        assert {path.name for path in out.iterdir()} == {".lock", "ckpt.pt"}
    assert outcomes == {0, 2}


def test_what_is_no_checkpoint_of_ours(tmp_path):
    torch.save({"weights": torch.zeros(3)}, tmp_path / "foreign.pt")
    torch.save(make_state(), tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    torch.save(GPT(CONFIG), tmp_path / "module.pt")
    torch.save(make_state(model=dict(GPT(CONFIG).named_parameters())), tmp_path / "parameters.pt")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    (tmp_path / "folder.pt").mkdir()
    for path in tmp_path.iterdir():
        with pytest.raises(Damaged, match="is damaged or not a checkpoint"):
            read_checkpoint(path)
    with pytest.raises(Damaged, match="No such file"):
        read_checkpoint(tmp_path / "nowhere.pt")


def test_a_later_version_is_told_and_not_taken_for_damage(tmp_path, capsys):
    save(tmp_path, make_state())
    save(tmp_path, make_state(version=2))
    with pytest.raises(UserError, match=r"ckpt\.pt was written by a later minuteGPT \(format 2") as caught:
        load_run(tmp_path)  # ckpt-prev.pt would load, and lose steps without a word
    assert not isinstance(caught.value, Damaged)


@pytest.mark.parametrize("removed", [{"softcap": 0.0, "zero_init": False}, {"zero_init": True}, {"softcap": 0}])
def test_removed_settings_that_do_not_change_the_model_are_ignored(tmp_path, removed):
    model = GPT(CONFIG).eval()
    save(tmp_path, make_state(model=model.state_dict(), model_config=asdict(CONFIG) | removed))
    state = load_run(tmp_path)
    assert state["model_config"] == asdict(CONFIG)
    again, idx = build_model(state).eval(), torch.arange(8)[None]
    assert again.config == CONFIG and torch.equal(again(idx)[0], model(idx)[0])


@pytest.mark.parametrize("softcap", [15.0, 30, 1e-9, -15.0, float("nan"), "0", None, False])
def test_a_model_with_a_softcap_is_refused_and_not_taken_for_damage(tmp_path, softcap):
    save(tmp_path, make_state())
    save(tmp_path, make_state(model_config=asdict(CONFIG) | {"softcap": softcap, "zero_init": True}))
    with pytest.raises(UserError) as caught:
        load_run(tmp_path)  # ckpt-prev.pt would load, and lose steps without a word
    assert not isinstance(caught.value, Damaged)
    assert str(caught.value) == (
        f"{tmp_path / 'ckpt.pt'} was trained with softcap={softcap!r}, which this version does not have any more. "
        "To use it, type `git checkout 040c685`"
    )


def test_a_softcap_that_no_reader_saw_builds_no_model():
    state = make_state()
    state["model_config"]["softcap"] = 15.0
    with pytest.raises(UserError, match=r"softcap=15\.0"):
        build_model(state)


HUGE = 10**12
BAD_CONFIGS: dict[str, list[Any]] = {
    "n_layer": [10**9, 0, -1, 3, "2", 2.0, True, None],
    "n_embd": [HUGE, 17, 0],
    "n_head": [10**9, 3, -2, 0],
    "n_kv_head": [10**9, 3, -1],
    "vocab_size": [HUGE, 12, 0],
    "block_size": [HUGE, 9, 7, 0, -1],
    "dropout": [2.0, "0", float("nan")],
    "ngram": [2, 8, 10**9, -1, "3", 2.0],
    "bias": [True, 1],
    "pos": ["rope", "../../x", 3],
    "norm": ["rmsnorm"],
    "tie": [3],
    "no_such_knob": [1],
    "__class__": [1],
}


@linux
@pytest.mark.parametrize("name, value", [(name, value) for name in BAD_CONFIGS for value in BAD_CONFIGS[name]])
def test_a_config_that_its_weights_do_not_bear_out_builds_nothing(tmp_path, name, value):
    state = make_state()
    state["model_config"][name] = value
    save(tmp_path, state)
    assert harmless(tmp_path, lambda path: build_model(load_run(path)))


@linux
def test_a_block_size_that_no_weight_bears_out_is_bounded(tmp_path):
    config = GPTConfig(**asdict(CONFIG) | {"pos": "rope"})
    for block_size in (HUGE, 2**16 + 1):
        save(tmp_path, make_state(config, model_config=asdict(config) | {"block_size": block_size}))
        assert harmless(tmp_path, lambda path: build_model(load_run(path)))
    save(tmp_path, make_state(config, model_config=asdict(config) | {"block_size": 1024}))
    assert build_model(load_run(tmp_path)).config.block_size == 1024


@pytest.mark.parametrize("change", ["missing", "extra", "shape", "name", "none"])
def test_weights_that_do_not_fit_the_config(change):
    state = make_state()
    model = state["model"] = dict(state["model"])
    last = "transformer.h.1.mlp.c_proj.weight"
    if change == "missing":
        del model[last]
    if change == "extra":
        model["transformer.h.1.mlp.c_proj.bias"] = torch.zeros(16)
    if change == "shape":
        model[last] = model[last].T
    if change == "name":
        model["transformer.h.one"] = model.pop(last)
    if change == "none":
        model.clear()
    with pytest.raises(UserError, match="do not fit together"):
        build_model(state)


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One way in which a file goes bad, by accident or on purpose."""
    bad = bytearray(data)
    kind = rng.randrange(7)
    where, length = rng.randrange(len(bad)), rng.randrange(1, 200)
    if kind == 0:
        bad[where] ^= 1 << rng.randrange(8)
    elif kind == 1:
        bad[where : where + length] = rng.randbytes(length)
    elif kind == 2:
        del bad[where:]
    elif kind == 3:
        del bad[where : where + length]
    elif kind == 4:
        bad[where : where + length] = bytes(length)
    elif kind == 5:
        bad[where:where] = bad[where : where + length]
    else:
        other = rng.randrange(len(bad))
        bad[where : where + length] = bad[other : other + length]
    return bytes(bad)


def test_500_mutated_files_are_refused_or_read_as_they_were(tmp_path):
    path = tmp_path / "a.pt"
    save_checkpoint_file(path, make_state())
    good, whole = path.read_bytes(), read_checkpoint(path)
    rng, refused, seconds = random.Random(0), 0, 0.0
    for _ in range(500):
        path.write_bytes(mutate(good, rng))
        started = time.perf_counter()
        try:
            assert same(read_checkpoint(path), whole)  # the change hit a byte that means nothing, as in the padding
        except UserError as error:
            assert "a.pt is damaged" in str(error)
            refused += 1
        seconds = max(seconds, time.perf_counter() - started)
    assert refused > 350 and seconds < 2


@pytest.mark.filterwarnings("ignore:invalid escape")
def test_500_files_mutated_behind_right_checksums_do_no_harm(tmp_path):
    path = tmp_path / "a.pt"
    tiny = make_state(GPTConfig(n_layer=1, n_head=1, n_embd=4, block_size=4, vocab_size=5), rng=None)
    save_checkpoint_file(path, tiny)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    rng, refused = random.Random(1), 0
    for _ in range(500):
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in parts.items():
                wanted = name.endswith("data.pkl") or rng.random() < 0.05
                archive.writestr(name, mutate(data, rng) if wanted else data)
        try:
            build_model(read_checkpoint(path))
        except UserError:
            refused += 1
    assert refused > 300  # the rest changed a name, a number or a weight within what a state may hold
