"""bench.py as a user runs it, on a model so small that its figures mean nothing: that it measures what it says."""

import json
import math

import pytest
import torch
from harness import ROOT, make_dataset, make_run, run

from minutegpt import device, native
from minutegpt.data.tokenizer import char_tokenizer
from minutegpt.device import Machine
from model import GPT, GPTConfig

TEXT = "The quick brown fox jumps over the lazy dog. " * 40
TINY = [
    "--dataset=fox", "--batch_size=2", "--block_size=16", "--n_layer=1", "--n_head=2", "--n_embd=32", "--dropout=0.0",
    "--device=cpu", "--dtype=float32", "--compile=false", "--repeats=2", "--steps=1", "--new_tokens=20",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    make_dataset(folder / "fox", char_tokenizer(TEXT), TEXT, TEXT[:400])
    return folder


def test_every_part_gives_its_figures(data):
    done = run(
        "bench.py", "--json", "--parts=train,decode", "--decode_batches=1,3",
        "--decode_formats=float32,int8,int4", *TINY, data=data,
    )  # fmt: skip
    assert done.status == 0, done.err
    found = json.loads(done.out)
    train, decode = found["train"], found["decode"]
    assert set(train["seconds"]) == {"data", "forward", "backward", "optimizer"}
    step = 2 * 16 / train["tokens_per_second"]
    # the parts are of the same two steps, and the median of two is their mean: together no longer than a step
    assert 0 < sum(train["seconds"].values()) <= 1.001 * step
    assert 0 < train["mfu"] < 1 and found["peak_memory_bytes"] > 1e7
    assert set(decode) == {"1", "3"}
    for rows, figures in decode.items():
        by_c = {"float32_native", "int8_native"} if native.build() else set()
        assert {"uncached", "prefill", "float32_eager", "int8_eager", "int4_eager"} | by_c == set(figures), rows
        assert all(math.isfinite(figures[f"{name}_eager"]["from_one"]) for name in ("float32", "int8", "int4"))


def test_the_device_is_named_on_apple_silicon(monkeypatch):
    """CUDA's functions raise there."""
    mps = Machine(torch.device("mps"), torch.float32, False)
    assert device.machine_name(mps) == device.device_name("mps") == "mps"
    monkeypatch.setattr(device, "matmul_flops", lambda machine: 1.0)
    assert device.peak_flops(mps) == (1.0, "measured matrix product")


def test_config_files_of_training_are_taken(data):
    done = run("bench.py", "config/shakespeare_cpu.py", "--parts=train", "--json", *TINY, data=data)
    assert done.status == 0, done.err
    assert json.loads(done.out)["train"]["tokens_per_second"] > 0


def test_it_takes_every_config_that_training_takes(data):
    """Their settings are read; the parts that need a text or a model of their size are left out."""
    configs = sorted((ROOT / "config").glob("*.py"))
    assert "finetune_shakespeare.py" in [config.name for config in configs]
    for config in configs:
        done = run("bench.py", str(config), "--parts=read", "--read_megabytes=0.1", "--device=cpu", data=data)
        assert done.status == 0, done.err
        assert ("init_from=gpt2 has no effect" in done.out) == (config.name == "finetune_shakespeare.py")


def test_the_start_of_training_is_compared_with_importing_torch(data):
    done = run("bench.py", "--parts=start", "--json", *TINY, "--repeats=1", data=data)
    assert done.status == 0, done.err
    start = json.loads(done.out)["start"]
    assert start["ratio"] == pytest.approx(start["first_step"] / start["import_torch"])
    assert start["first_step"] > 0.5 * start["import_torch"] > 0.05
    assert "times as long" in done.err
    failed = run("bench.py", "--parts=start", *TINY, "--dataset=not_there", data=data)
    assert failed.status == 2 and "train.py ended before its first step" in failed.err and "not_there" in failed.err


def test_reading_of_four_kinds_of_text(data):
    done = run("bench.py", "--parts=read", "--read_megabytes=0.1", "--json", "--device=cpu", data=data)
    speeds = json.loads(done.out)["read_megabytes_per_second"]
    assert len(speeds) == 4 and all(speed > 0 for speed in speeds.values()), done.err


@pytest.mark.slow
def test_compression_with_a_trained_model(data, tmp_path):
    tokenizer = char_tokenizer(TEXT)
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=tokenizer.vocab_size, n_layer=1, n_head=2, n_embd=32))
    make_run(tmp_path / "run", model, tokenizer, tokenizer.encode(TEXT), "fox", steps=30)
    done = run("bench.py", "--parts=compress", "--out_dir=run", "--json", "--compress_streams=0,2", "--device=cpu",
               data=data, cwd=tmp_path)  # fmt: skip
    assert done.status == 0, done.err
    found = json.loads(done.out)["compress"]
    assert found["bytes"] == 400 and set(found["streams"]) == {"6", "2"}
    assert all(0 < found[name] < 16 for name in ("xz", "bzip2", "gzip", "evaluate_bits_per_byte"))
    for row in found["streams"].values():
        assert row["compress_bytes_per_second"] > 0 and row["decompress_bytes_per_second"] > 0
        assert 0 <= row["added_by_coder"] < 0.1
        assert row["added_to_evaluate"] == pytest.approx(row["bits_per_byte"] / found["evaluate_bits_per_byte"] - 1)


def test_the_model_has_the_sizes_of_the_settings(data):
    done = run("bench.py", "--parts=train", *TINY, "--vocab_size=50", "--pos=rope", "--optimizer=muon", data=data)
    assert done.status == 0, done.err
    n_params = 50 * 32 + 12 * 32**2 + 3 * 32  # embedding, matrices of one layer, norms
    assert f"2 x 16 tokens, {n_params / 1000:.3g}k parameters" in done.out


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--decode_formats=float32,int9"], "--decode_formats=int9 is not one of float32, bfloat16, int8, int4"),
        (
            ["--parts=train,bpe"],
            "--parts=bpe is not one of matmul, train, decode, read, start, compress. dev/compare.py has others",
        ),
        (["--parts=decode_x"], "--parts=decode_x is not one of"),
        (["--n_head=5"], "n_embd=32 is not divisible by n_head=5"),
        (["--parts=compress", "--out_dir=nowhere"], "evaluate.py fails: no checkpoint in nowhere"),
        (["--repeats=0"], "--repeats=0 must be at least 1"),
        (["--decode_batches=1,x"], "--decode_batches=1,x: 'x' is not a number of rows"),
        (["--decode_batches=0"], "'0' is not a number of rows"),
        (["--vocab_size=2"], "--vocab_size=2 is below the "),
        (["--compress_megabytes=0"], "--compress_megabytes=0.0 must be at least 0.001"),
    ],
)
def test_mistakes_are_told_in_one_line(data, argv, says):
    done = run("bench.py", *TINY, *argv, data=data)
    assert done.status == 2 and says in done.err and "Traceback" not in done.err, done.err
