"""dev/compare.py next to a stand-in for nanoGPT, which has its interface."""

import json
import sys

import pytest
from harness import ROOT, make_dataset, run

from minutegpt import native
from minutegpt.data.tokenizer import char_tokenizer

TEXT = "The quick brown fox jumps over the lazy dog. " * 40
TINY = [
    "--dataset=fox", "--batch_size=2", "--block_size=16", "--n_layer=1", "--n_head=2", "--n_embd=32", "--dropout=0.0",
    "--device=cpu", "--dtype=float32", "--compile=false", "--repeats=2", "--steps=1", "--new_tokens=20",
]  # fmt: skip
NANOGPT = """
from dataclasses import dataclass
import torch
from torch.nn import functional as F

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = torch.nn.Embedding(config.vocab_size, config.n_embd)

    def forward(self, idx, targets=None):
        logits = self.wte(idx) @ self.wte.weight.T
        return logits, None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.view(-1))

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        assert device_type == "cpu"
        return torch.optim.AdamW(self.parameters(), lr=learning_rate)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        for _ in range(max_new_tokens):
            idx = torch.cat((idx, self(idx)[0][:, -1].argmax(-1, keepdim=True)), 1)
        return idx
"""


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    folder = tmp_path_factory.mktemp("house")
    make_dataset(folder / "data" / "fox", char_tokenizer(TEXT), TEXT, TEXT[:400])
    (folder / "nano").mkdir()
    (folder / "nano" / "model.py").write_text(NANOGPT, encoding="utf-8")
    return folder


def test_training_and_decoding_next_to_nanogpt(house):
    argv = ("--nanogpt=nano", "--json", "--decode_batches=3", "--decode_formats=float32,int8")
    done = run("dev/compare.py", *argv, *TINY, cwd=house)
    assert done.status == 0, done.err
    result = json.loads(done.out)
    speed = result["train"]["tokens_per_second"]
    assert result["train"]["ratio"] == pytest.approx(speed["ours"] / speed["nanogpt"])
    by_c = {"float32_native", "int8_native"} if native.build() else set()
    assert set(result["decode"]["3"]) == {"float32_eager", "int8_eager"} | by_c
    for figures in result["decode"]["3"].values():
        for start in ("from_one", "from_full"):
            assert figures[f"{start}_ratio"] == pytest.approx(figures[start] / figures["nanogpt"])


NANOGPT_TRAIN = """
import json, sys, torch
from model import GPT, GPTConfig
assert "--max_iters=2000" in sys.argv and open("data/shakespeare_char/ids.txt").read() == "prepared"
shape = dict(block_size=16, vocab_size=VOCAB, n_layer=1, n_head=2, n_embd=8, dropout=0.0, bias=False)
import os
os.makedirs("out")
sys.path.insert(0, REPO)
import importlib.util
spec = importlib.util.spec_from_file_location("ours", REPO + "/model.py")
ours = importlib.util.module_from_spec(spec)
sys.modules["ours"] = ours
spec.loader.exec_module(ours)
torch.manual_seed(1)
model = ours.GPT(ours.GPTConfig(**shape))  # nanoGPT's weights have the same names
state = {"model": model.state_dict(), "optimizer": None, "model_args": shape, "iter_num": 3, "best_val_loss": 1.0,
         "config": {"dataset": "fox"}}
torch.save(state, "out/ckpt.pt")
print("step 0: train loss 3.3000, val loss 3.2000")
print("iter 0: loss 3.3000, time 50.00ms, mfu -100.00%")
"""
PREPARE = """
text = open("data/shakespeare_char/input.txt").read()
assert text == TEXT
open("data/shakespeare_char/ids.txt", "w").write("prepared")
"""


@pytest.mark.slow
def test_a_recipe_next_to_nanogpt(house):
    data = house / "nano" / "data" / "shakespeare_char"
    data.mkdir(parents=True)
    head = f"REPO, VOCAB, TEXT = {str(ROOT)!r}, {len(set(TEXT))}, {TEXT + TEXT[:400]!r}\n"
    (data / "prepare.py").write_text(head + PREPARE, encoding="utf-8")
    (house / "nano" / "train.py").write_text(head + NANOGPT_TRAIN, encoding="utf-8")
    config = "dataset, n_layer, n_head, n_embd, block_size, batch_size = 'fox', 1, 2, 32, 16, 4\n"
    (house / "fox.py").write_text(config + "max_iters, eval_interval, compile = 100, 100, 'false'\n", encoding="utf-8")
    argv = ("--nanogpt=nano", "--parts=recipe", "--json", "--device=cpu", "--picture=race.png", str(house / "fox.py"))
    done = run("dev/compare.py", *argv, cwd=house, data=house / "data", seconds=200)
    assert done.status == 0, done.err
    result = json.loads(done.out)["recipe"]
    assert 3 < result["nanogpt"]["loss"] < 3.5 and 0 < result["ours"]["loss"] < 2.5  # untrained, and trained
    assert result["ours"]["walls"] == pytest.approx(result["ours"]["seconds"] / result["nanogpt"]["seconds"])
    assert not (house / "nano" / "out").exists()  # a copy was trained
    assert (house / "race.png").stat().st_size > 5000


def test_bpe_next_to_the_tokenizers_library(house):
    pytest.importorskip("tokenizers")
    done = run("dev/compare.py", "--parts=bpe", "--json", "--dataset=fox", "--device=cpu", cwd=house, seconds=200)
    assert done.status == 0, done.err
    seconds = json.loads(done.out)["bpe_seconds"]
    assert {"ours", "tokenizers"} == set(seconds) and min(seconds.values()) > 0


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--nanogpt=nowhere"], "--nanogpt=nowhere: there is no nowhere/model.py. Name a checkout of nanoGPT"),
        (["--parts=matmul"], "--parts=matmul is not one of train, decode, recipe, bpe, encode"),
        (["--nanogpt=nano", "--decode_formats=int9"], "--decode_formats=int9 is not one of float32, bfloat16, int8"),
    ],
)
def test_a_mistake_is_one_line(house, argv, words):
    done = run("dev/compare.py", *TINY, *argv, cwd=house)
    assert done.status == 2 and words in done.err and "Traceback" not in done.err, done.err


@pytest.mark.skipif(sys.platform != "linux", reason="it reads the memory of processes from /proc")
def test_preparing_installed_text_next_to_libraries(tmp_path):
    done = run("dev/time_corpus.py", "--megabytes=1", "--vocab_size=300", "--json", cwd=tmp_path, fork=False)
    assert done.status == 0, done.err
    result = json.loads(done.out.splitlines()[-1])
    assert (tmp_path / "out-corpus" / "corpus.txt").stat().st_size == result["bytes"] > 1e6
    assert {"seconds", "peak_memory_bytes"} == set(result["prepare"]) and result["prepare"]["peak_memory_bytes"] > 1e7
    assert all(times["ours"] > 0 and times["tiktoken"] > 0 for times in result["encode_seconds"].values())
    assert result["bpe_seconds"]["ours"] > 0
