"""evaluate.py as a user runs it, against the loss computed one token after another; and nanoGPT's checkpoints."""

import json
import math
import os
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
from scripts import ROOT, Scripts, make_dataset
from torch.nn import functional as F

from minutegpt import checkpoint
from minutegpt.tokenizer import byte_tokenizer, char_tokenizer, from_json, train_bpe
from model import GPT, GPTConfig

SHAPE = {"block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 32}
TRAIN = "".join(f"{i} bottles of beer on the wall, {i} bottles of beer.\n" for i in range(30, 0, -1))
VAL = "naïve 7 bottles of ☕ on the wall, take one down, 6 bottles of 東京.\n"
KEYS = ["split", "loss", "perplexity", "bits_per_byte", "tokens", "bytes", "seconds"]


def random_gpt(seed=0, **knobs):
    """Random weights, large enough that each token's loss is another."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**SHAPE | knobs)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2)
    return model


def save(folder, model, tokenizer, dataset, **more):
    folder.mkdir(exist_ok=True)
    state = {"model": model.state_dict(), "model_config": asdict(model.config), "step": 0}
    checkpoint.save(folder, state | {"config": {"dataset": dataset}, "tokenizer": tokenizer.to_json()} | more)
    return model


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """Datasets char, byte and bpe of one text, with a run of random weights each; rope is one more on byte."""
    folder = tmp_path_factory.mktemp("house")
    tokenizers = {
        "char": CHARACTERS,
        "byte": byte_tokenizer(),
        "bpe": train_bpe([TRAIN], 280),
    }
    for name, tokenizer in tokenizers.items():
        make_dataset(folder / "data" / name, tokenizer, TRAIN, VAL)
        save(folder / name, random_gpt(vocab_size=tokenizer.vocab_size), tokenizer, name)
    save(folder / "rope", random_gpt(vocab_size=256, pos="rope", n_kv_head=1), tokenizers["byte"], "byte")
    return folder


@pytest.fixture(scope="module")
def scripts(house):
    with Scripts(house / "data") as started:
        yield started


@pytest.fixture
def evaluate(scripts, house):
    """Runs evaluate.py --json in the house; the object."""

    def run(*argv):
        done = scripts.run("evaluate.py", "--json", "--device=cpu", *map(str, argv), cwd=house)
        assert done.status == 0 and done.err == "", done.err
        assert done.out.count("\n") == 1 and done.out.endswith("\n")
        return json.loads(done.out)

    return run


def loaded(folder):
    state = checkpoint.load(folder)
    return checkpoint.build_model(state).eval(), from_json(state["tokenizer"])


@torch.no_grad()
def naive_loss(logits_of, ids, T, stride=0):
    """The mean loss in nats of ids[1:], each predicted once, one at a time."""
    ids, total, N = torch.tensor(ids), 0.0, len(ids)
    for target in range(1, N):
        if stride in (0, T):
            first = (target - 1) // T * T  # windows side by side
        elif target <= T:
            first = 0
        else:  # of the windows that end at T, T + stride, ... or with the text, the first one that reaches this far
            first = min(T + math.ceil((target - T) / stride) * stride, N - 1) - T
        logits = logits_of(ids[first:target])[-1].double()
        total -= (logits - logits.logsumexp(0))[ids[target]].item()
    return total / (N - 1)


def logits_of(model):
    return lambda ids: model(ids[None])[0][0]


# ---------------------------------------------------------------------------------------- the numbers


def test_a_real_process_prints_one_object_and_nothing_else(house):
    env = os.environ | {"MINUTEGPT_DATA": str(house / "data"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "evaluate.py"), "--out_dir=char", "--json"]
    done = subprocess.run(command, cwd=house, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0 and done.stderr == "" and done.stdout.count("\n") == 1
    result = json.loads(done.stdout)
    assert list(result) == KEYS
    model, tokenizer = loaded(house / "char")
    loss = naive_loss(logits_of(model), tokenizer.encode(VAL), 16)
    assert result["loss"] == pytest.approx(loss, abs=1e-5)


@pytest.mark.parametrize("run", ["char", "byte", "bpe", "rope"])
@pytest.mark.parametrize("stride", [0, 1, 5, 16])
def test_every_token_is_predicted_once(evaluate, house, run, stride):
    model, tokenizer = loaded(house / run)
    ids = tokenizer.encode(VAL)
    assert (len(ids) - 1) % 16  # so that the last window is shorter
    result = evaluate(f"--out_dir={run}", f"--stride={stride}")
    loss = naive_loss(logits_of(model), ids, 16, stride)
    n_bytes = len(VAL.encode()) - len(tokenizer.decode_bytes(ids[:1]))  # the first one is given
    assert result["loss"] == pytest.approx(loss, abs=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert result["bits_per_byte"] == pytest.approx(loss * (len(ids) - 1) / math.log(2) / n_bytes, rel=1e-4)
    assert (result["tokens"], result["bytes"], result["split"]) == (len(ids) - 1, n_bytes, "val")
    assert 0 < result["seconds"] < 60


def test_the_train_split(evaluate, house):
    model, tokenizer = loaded(house / "bpe")
    result = evaluate("--out_dir=bpe", "--split=train")
    ids = tokenizer.encode(TRAIN)
    assert result["split"] == "train" and result["tokens"] == len(ids) - 1
    assert result["loss"] == pytest.approx(naive_loss(logits_of(model), ids, 16), abs=1e-5)


def test_the_batch_does_not_matter_and_the_dtype_little(evaluate):
    losses = [evaluate("--out_dir=byte", f"--batch_size={n}")["loss"] for n in (1, 3, 1000)]
    assert max(losses) - min(losses) < 1e-5
    rough = evaluate("--out_dir=byte", "--dtype=bfloat16")["loss"]
    assert 0 < abs(rough - losses[0]) < 0.05


def test_rotary_positions_go_beyond_the_training_context(evaluate, house):
    model, tokenizer = loaded(house / "rope")
    ids = tokenizer.encode(VAL)
    for T in (8, 40, 10**9):
        loss = naive_loss(logits_of(model), ids, T)
        assert evaluate("--out_dir=rope", f"--block_size={T}")["loss"] == pytest.approx(loss, abs=1e-5)


def test_a_model_that_knows_nothing_has_ln_v_and_one_that_is_sure_of_all_has_none(evaluate, house):
    tokenizer = byte_tokenizer()
    nothing = random_gpt(vocab_size=256)
    torch.nn.init.zeros_(nothing.lm_head.weight)
    save(house / "nothing", nothing, tokenizer, "byte")
    result = evaluate("--out_dir=nothing")
    assert result["loss"] == pytest.approx(math.log(256)) and result["perplexity"] == pytest.approx(256)
    assert result["bits_per_byte"] == pytest.approx(8)


def test_the_words_for_people(scripts, house):
    done = scripts.run("evaluate.py", "--out_dir=byte", "--stride=4", cwd=house)
    assert done.status == 0
    for words in (
        f"val split of byte, {len(VAL.encode()) - 1} predictions: loss ",
        "perplexity",
        "bits per byte",
        "stride 4",
    ):
        assert words in done.out
    assert scripts.run("evaluate.py", "--help").out.count("\nstride = ") == 1


# ---------------------------------------------------------------------------------------- nanoGPT's checkpoints


CHARACTERS = char_tokenizer(TRAIN + VAL)


def nanogpt_weights(bias, V=CHARACTERS.vocab_size, T=16, C=32, L=2):
    """Random weights under the names that nanoGPT gives them, in its order."""
    random = torch.Generator().manual_seed(0)
    shapes = {"wte": (V, C), "wpe": (T, C)}
    for h in (f"h.{i}." for i in range(L)):
        shapes |= {h + "ln_1": (C,), h + "attn.c_attn": (3 * C, C), h + "attn.c_proj": (C, C)}
        shapes |= {h + "ln_2": (C,), h + "mlp.c_fc": (4 * C, C), h + "mlp.c_proj": (C, 4 * C)}
    weights = {}
    for name, shape in (shapes | {"ln_f": (C,)}).items():
        weights[f"transformer.{name}.weight"] = torch.randn(shape, generator=random) * 0.2
        if bias and name not in ("wte", "wpe"):
            weights[f"transformer.{name}.bias"] = torch.randn(shape[0], generator=random) * 0.2
    return weights | {"lm_head.weight": weights["transformer.wte.weight"]}


def nanogpt_logits(weights, ids, n_head=2):
    """nanoGPT's forward pass, written anew and in float64: ids (T,) -> (T, V)."""
    w = {name: weight.double() for name, weight in weights.items()}
    T, C = len(ids), w["transformer.wte.weight"].shape[1]

    def linear(x, name):
        return F.linear(x, w[name + ".weight"], w.get(name + ".bias"))

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        return x * w[name + ".weight"] + w.get(name + ".bias", 0.0)

    x = w["transformer.wte.weight"][ids] + w["transformer.wpe.weight"][:T]
    for i in range(2):
        h = f"transformer.h.{i}."
        q, k, v = (a.view(T, n_head, C // n_head) for a in linear(norm(x, h + "ln_1"), h + "attn.c_attn").chunk(3, -1))
        scores = torch.einsum("thd,shd->hts", q, k) / math.sqrt(C // n_head)
        scores += torch.full((T, T), float("-inf")).triu(1)
        mixed = torch.einsum("hts,shd->thd", scores.softmax(-1), v).reshape(T, C)
        x = x + linear(mixed, h + "attn.c_proj")
        y = linear(norm(x, h + "ln_2"), h + "mlp.c_fc")
        y = y * 0.5 * (1 + torch.erf(y / math.sqrt(2)))
        x = x + linear(y, h + "mlp.c_proj")
    return norm(x, "transformer.ln_f") @ w["lm_head.weight"].T


@pytest.fixture(params=[(bias, prefix) for bias in (True, False) for prefix in ("", "_orig_mod.")], scope="module")
def nanogpt(request, tmp_path_factory):
    """A folder as nanoGPT leaves it, and its weights. Its meta.pkl would end whoever unpickles it."""
    bias, prefix = request.param
    folder = tmp_path_factory.mktemp("nano")
    weights = nanogpt_weights(bias)
    args = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "bias": bias, "dropout": 0.0}
    args["vocab_size"] = CHARACTERS.vocab_size
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(16, 16).tril().view(1, 1, 16, 16) for i in range(2)}
    named = {k: v for k, v in weights.items() if k != "lm_head.weight"}
    decayed = [p for p in named.values() if p.dim() >= 2]
    optimizer = torch.optim.AdamW(
        [{"params": [torch.nn.Parameter(p) for p in decayed], "weight_decay": 0.1},
         {"params": [torch.nn.Parameter(p) for p in named.values() if p.dim() < 2], "weight_decay": 0.0}],
    )  # fmt: skip
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.save(
        {"model": {prefix + k: v for k, v in (weights | masks).items()}, "optimizer": optimizer.state_dict(),
         "model_args": args, "iter_num": 3, "best_val_loss": torch.tensor(2.5),
         "config": {"dataset": "gone", "out_dir": "out", "learning_rate": 1e-3, "max_iters": 3, "device": "cuda",
                    "dtype": "float16", "compile": True, "backend": "nccl"}},
        folder / "ckpt.pt",
    )  # fmt: skip
    (folder / "meta.pkl").write_bytes(b"cos\n_exit\n(I66\ntR.")
    return folder, weights


def test_nanogpts_logits(nanogpt):
    folder, weights = nanogpt
    model = checkpoint.build_model(checkpoint.load(folder)).eval()
    idx = torch.randint(CHARACTERS.vocab_size, (3, 16), generator=torch.Generator().manual_seed(1))
    theirs = torch.stack([nanogpt_logits(weights, row) for row in idx])
    with torch.no_grad():
        assert (model(idx)[0] - theirs).abs().max() < 1e-5 * theirs.abs().max()


def test_evaluate_reads_nanogpts_folder(nanogpt, evaluate):
    folder, weights = nanogpt
    loss = naive_loss(lambda ids: nanogpt_logits(weights, ids), CHARACTERS.encode(VAL), 16)
    assert evaluate(f"--out_dir={folder}", "--dataset=char")["loss"] == pytest.approx(loss, abs=1e-5)


def test_sample_reads_nanogpts_folder(nanogpt, scripts, house):
    folder, weights = nanogpt
    argv = (f"--out_dir={folder}", "--dataset=char", "--temperature=0", "--start=take", "--max_new_tokens=12")
    done = scripts.run("sample.py", *argv, cwd=house)
    assert done.status == 0, done.err
    ids = CHARACTERS.encode("take")
    for _ in range(12):
        ids.append(int(nanogpt_logits(weights, torch.tensor(ids))[-1].argmax()))
    assert done.out == CHARACTERS.decode(ids) + "\n"


@pytest.mark.parametrize("nanogpt", [(True, "_orig_mod.")], indirect=True)
def test_train_resumes_nanogpts_folder(nanogpt, scripts, house, tmp_path):
    """One step at learning rate 0 with their optimizer's state leaves their weights as they were."""
    import shutil

    folder = shutil.copytree(nanogpt[0], tmp_path / "run")
    argv = (f"--out_dir={folder}", "--init_from=resume", "--dataset=char", "--max_iters=4", "--learning_rate=0",
            "--compile=false", "--batch_size=2", "--eval_iters=1",
            "--weight_decay=0", "--gradient_accumulation_steps=1")  # fmt: skip
    done = scripts.run("train.py", *argv, cwd=house)
    assert done.status == 0, done.err
    state = checkpoint.load(folder)
    assert state["step"] == 4 and not state["nanogpt"] and state["tokenizer"]["kind"] == "char"
    model = checkpoint.build_model(state).eval()
    idx = torch.arange(16)[None] * 2
    theirs = nanogpt_logits(nanogpt[1], idx[0])
    with torch.no_grad():
        assert (model(idx)[0][0] - theirs).abs().max() < 1e-5 * theirs.abs().max()


# ---------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["no checkpoint in out", "here: ", "char"]),
        (["char"], ["no config file 'char'", "--out_dir=char"]),
        (["--out_dir=char/ckpt.pt"], ["char/ckpt.pt is a file", "--out_dir=char"]),
        (["--out_dir=char", "--split=test"], ["--split=test is not one of train, val"]),
        (["--out_dir=char", "--dataset=nowhere"], ["no dataset at", "prepare/text.py"]),
        (["--out_dir=char", "--dataset=byte"], ["byte was prepared with another tokenizer", "--dataset=NAME"]),
        (["--out_dir=char", "--json=x.json"], ["--json takes true or false", "'x.json'"]),
        (["--out_dir=char", "--stride=17"], ["--stride=17 would skip tokens", "16"]),
        (["--out_dir=char", "--stride=-1", "--batch_size=0"], ["--stride=-1", "--batch_size=0 must be at least 1"]),
        (["--out_dir=char", "--block_size=32"], ["--block_size=32", "learned 16 positions", "rope"]),
        (["--out_dir=char", "--blocksize=32"], ["'blocksize'", "did you mean block_size"]),
        (["--out_dir=char", "--device=gpu"], ["--device=gpu is not on this machine", "cpu"]),
        (["--out_dir=torn"], ["torn", "damaged or not a checkpoint"]),
        (["--out_dir=nan"], ["the loss", "is nan", "no numbers"]),
        (["--out_dir=byte", "--dataset=one"], ["the val split of one has 1 token", "more text"]),
    ],
)
def test_a_mistake_is_told_and_nothing_else(scripts, house, argv, words):
    if not (house / "torn").exists():
        (house / "torn").mkdir()
        (house / "torn" / "ckpt.pt").write_bytes((house / "char" / "ckpt.pt").read_bytes()[:-100])
        broken = random_gpt(vocab_size=256)
        torch.nn.init.constant_(broken.lm_head.weight, np.nan)
        save(house / "nan", broken, byte_tokenizer(), "byte")
        make_dataset(house / "data" / "one", byte_tokenizer(), TRAIN, "x")
    done = scripts.run("evaluate.py", *argv, cwd=house)
    assert done.status == 2 and done.out == ""
    assert done.err.count("error: ") == 1 and "Traceback" not in done.err
    assert all(word in done.err for word in words), done.err
