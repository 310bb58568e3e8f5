"""evaluate.py as a user runs it, against the loss computed one token after another; and nanoGPT's checkpoints."""

import json
import math
from dataclasses import asdict
from itertools import pairwise

import harness
import numpy as np
import pytest
import torch
from harness import make_dataset, make_run
from torch.nn import functional as F

from minutegpt import checkpoint
from minutegpt.data.tokenizer import END, byte_tokenizer, char_tokenizer, from_json, gpt2_tokenizer, train_bpe
from model import GPT, GPTConfig

SHAPE = {"block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 32}
TRAIN = "".join(f"{i} bottles of beer on the wall, {i} bottles of beer.\n" for i in range(30, 0, -1))
VAL = "naïve 7 bottles of ☕ on the wall, take one down, 6 bottles of 東京.\n"
KEYS = ["split", "loss", "perplexity", "bits_per_byte", "tokens", "bytes", "seconds"]


def random_gpt(seed=0, **settings):
    """Random weights, large enough that each token's loss is another."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**SHAPE | settings)).eval()
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


def test_a_quantized_model_without_float_parameters(house, evaluate):
    """RMSNorm has no weights and nothing has a bias, so that all matrices become integers."""
    fast = {"vocab_size": 256, "pos": "rope", "norm": "rmsnorm", "qk_norm": True, "ngram": 3, "tie": False}
    model = save(house / "fast", random_gpt(**fast), byte_tokenizer(), "byte")
    found = evaluate("--out_dir=fast", "--quantize=int8", "--memorization_tokens=20")
    assert found["memorization"]["tokens"] >= 20
    done = harness.run("evaluate.py", "--json", "--compare", "fast", "byte", "--quantize=int8", cwd=house)
    found = json.loads(done.out)
    assert found["compare"][0]["params"] == model.n_params() > 50_000


@pytest.fixture
def evaluate(house):
    """Runs evaluate.py --json in the house; the object."""

    def run(*argv):
        done = harness.run("evaluate.py", "--json", "--device=cpu", *map(str, argv), cwd=house)
        assert done.status == 0 and done.err == "", done.err
        assert done.out.count("\n") == 1 and done.out.endswith("\n")
        return json.loads(done.out)

    return run


def loaded(folder):
    state = checkpoint.load_run(folder)
    return checkpoint.build_model(state).eval(), from_json(state["tokenizer"])


def naive_loss(logits_of, ids, T, stride=0):
    """The mean loss in nats of ids[1:]."""
    each = naive_losses(logits_of, ids, T, stride)
    return sum(loss for _, loss in each) / len(each)


@torch.no_grad()
def naive_losses(logits_of, ids, T, stride=0):
    """Of ids[1:], each predicted once, one at a time: how many stood before it, and its loss in nats."""
    ids, each, N = torch.tensor(ids), [], len(ids)
    for target in range(1, N):
        if stride in (0, T):
            first = (target - 1) // T * T  # windows side by side
        elif target <= T:
            first = 0
        else:  # of the windows that end at T, T + stride, ... or with the text, the first one that reaches this far
            first = min(T + math.ceil((target - T) / stride) * stride, N - 1) - T
        logits = logits_of(ids[first:target])[-1].double()
        each.append((target - first, -(logits - logits.logsumexp(0))[ids[target]].item()))
    return each


def logits_of(model):
    return lambda ids: model(ids[None])[0][0]


# ---------------------------------------------------------------------------------------- the numbers


def test_the_loss_of_a_mixture_is_the_mean_of_its_datasets_by_weight(house, evaluate):
    make_dataset(house / "data" / "other", byte_tokenizer(), VAL * 9, TRAIN)
    one, two = (evaluate("--out_dir=byte", f"--dataset={name}") for name in ("byte", "other"))
    assert list(one) == KEYS and abs(one["loss"] - two["loss"]) > 0.01 and two["tokens"] > 2 * one["tokens"]
    both = evaluate("--out_dir=byte", "--dataset=byte:7,other:3")
    for key in ("loss", "bits_per_byte"):
        assert both[key] == pytest.approx(0.7 * one[key] + 0.3 * two[key])
        assert [part[key] for part in both["parts"]] == [one[key], two[key]]
    assert [part["dataset"] for part in both["parts"]] == ["byte", "other"]
    assert both["tokens"] == one["tokens"] + two["tokens"] and both["bytes"] == one["bytes"] + two["bytes"]
    done = harness.run("evaluate.py", "--out_dir=byte", "--dataset=byte:7,other:3", "--device=cpu", cwd=house)
    assert f"other, weight 0.3, {two['tokens']:,} predictions: loss {two['loss']:.4f}" in done.out

    def compare(dataset):
        argv = ["--compare", "byte", "bpe", f"--dataset={dataset}", "--by_position", "--json", "--device=cpu"]
        return json.loads(harness.run("evaluate.py", *argv, cwd=house).out)["compare"]

    compared, *alone = (compare(dataset) for dataset in ("byte:7,other:3", "byte", "other"))
    groups = compared[0]["by_position"]
    whole = sum(group["loss"] * group["tokens"] for group in groups) / sum(group["tokens"] for group in groups)
    assert whole == pytest.approx(both["loss"], abs=0.01)  # the tokens of a group are rounded
    for run, first, second in zip(compared, *alone, strict=True):
        if run["name"] != "bigram":  # which counts the training text of both
            assert run["bits_per_byte"] == pytest.approx(0.7 * first["bits_per_byte"] + 0.3 * second["bits_per_byte"])


def test_a_real_process_prints_one_object_and_nothing_else(house):
    done = harness.run("evaluate.py", "--out_dir=char", "--json", cwd=house, fork=False)
    assert done.status == 0 and done.err == "" and done.out.count("\n") == 1
    result = json.loads(done.out)
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
    for T in (8, 40, 10**5):
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


def test_the_words_for_people(house):
    done = harness.run("evaluate.py", "--out_dir=byte", "--stride=4", cwd=house)
    assert done.status == 0
    for words in (
        f"val split of byte, {len(VAL.encode()) - 1} predictions: loss ",
        "perplexity",
        "bits per byte",
        "stride 4",
        f"over {len(VAL.split())} words",
        "bigram baseline: loss ",
    ):
        assert words in done.out
    assert harness.run("evaluate.py", "--help").out.count("\nstride = ") == 1


# ---------------------------------------------------------------------------------------- next to the loss


def test_extra_in_json_has_words_and_the_bigram_baseline(evaluate, house):
    model, tokenizer = loaded(house / "bpe")
    ids = tokenizer.encode(VAL)
    result = evaluate("--out_dir=bpe", "--extra")
    assert list(result) == [*KEYS, "word_perplexity", "words", "bigram_loss"]
    words = tokenizer.decode(ids[1:]).split()
    nats = naive_loss(logits_of(model), ids, 16) * (len(ids) - 1)
    assert result["words"] == len(words) and result["bigram_loss"] == pytest.approx(naive_bigram(tokenizer))
    assert result["word_perplexity"] == pytest.approx(math.exp(min(nats / len(words), 700)), rel=1e-3)


def naive_bigram(tokenizer):
    """Witten and Bell's smoothing, one pair after another."""
    train, val, V = tokenizer.encode(TRAIN), tokenizer.encode(VAL), tokenizer.vocab_size
    nats = 0.0
    for i, j in pairwise(val):
        followers = [b for a, b in pairwise(train) if a == i]
        kinds = len(set(followers)) or 1
        single = (train.count(j) + 1) / (len(train) + V)
        nats -= math.log((followers.count(j) + kinds * single) / (len(followers) + kinds))
    return nats / (len(val) - 1)


@pytest.mark.parametrize(
    ("run", "T", "stride"), [("char", 16, 0), ("rope", 40, 0), ("rope", 10**5, 0), ("byte", 16, 5)]
)
def test_the_loss_by_position(evaluate, house, run, T, stride):
    model, tokenizer = loaded(house / run)
    ids = tokenizer.encode(VAL)
    longest = min(T, len(ids) - 1)
    argv = (f"--out_dir={run}", f"--block_size={T}", f"--stride={stride}", "--by_position", "--plot_file=by.png")
    done = harness.run("evaluate.py", *argv, "--json", cwd=house)
    assert done.status == 0 and done.err == "plot: by.png\n"
    result = json.loads(done.out)
    assert list(result) == [*KEYS, "by_position"]
    assert (house / "by.png").read_bytes().startswith(b"\x89PNG")
    each, first = naive_losses(logits_of(model), ids, longest, stride), 1
    for group in result["by_position"]:
        mine = [loss for before, loss in each if group["from"] <= before <= group["to"]]
        assert group["from"] == first and group["to"] == min(longest, 2 ** math.ceil(math.log2(first)))
        assert group["tokens"] == len(mine) and group["loss"] == pytest.approx(sum(mine) / len(mine), abs=1e-5)
        first = group["to"] + 1
    assert first == longest + 1
    done = harness.run("evaluate.py", *argv, cwd=house)
    assert done.out.count("*") == (0 if longest <= 16 else len(result["by_position"]) - 5 + 1)
    assert "tokens before" in done.out and f"{result['by_position'][-1]['loss']:.4f}" in done.out


def test_a_model_that_recites_is_found_out(evaluate, house):
    line = "the quick brown fox jumps over the lazy dog.\n"
    tokenizer = char_tokenizer(line)
    torch.manual_seed(0)
    learned = GPT(GPTConfig(**SHAPE | {"vocab_size": tokenizer.vocab_size, "block_size": 64}))
    make_dataset(house / "data" / "fox", tokenizer, line * 9, "these words come from nobody else. " * 9)
    make_run(house / "fox", learned, tokenizer, tokenizer.encode(line * 9), "fox")
    argv = ("--memorization_tokens=200", "--temperature=0", "--extra")
    result = evaluate("--out_dir=fox", *argv)["memorization"]
    assert result["tokens"] == 4 * 64  # whole rows
    assert result["known_words"] > 0.8 and result["copied"] > 0.8
    assert result["text_known_words"] < 0.3 and result["text_copied"] == 0
    assert evaluate("--out_dir=byte", "--memorization_tokens=50", "--temperature=1")["memorization"]["copied"] == 0
    done = harness.run("evaluate.py", "--out_dir=fox", *argv, cwd=house)
    assert "the val split" in done.out and f"{result['copied']:.1%}" in done.out


# ---------------------------------------------------------------------------------------- several, side by side


def test_runs_side_by_side(evaluate, house):
    """All read the text of the first: for the byte run, char's text is encoded again."""
    (house / "char" / "log.jsonl").write_text('{"step": 0, "seconds": 0.0, "val_loss": 4.0}\n{"step": 9, "sec')
    size = (house / "char" / "log.jsonl").stat().st_size
    for argv in (["--compare", "char", "byte", "bpe"], ["--out_dir=char", "--compare=byte,bpe,char"]):
        done = harness.run("evaluate.py", *argv, cwd=house)
        assert done.status == 0 and done.err == "plot: char/compare.png\n", done.err
        table = [line.split() for line in done.out.splitlines()[2:]]
        assert [row[0] for row in table] == ["loss", "char", "byte", "bpe", "bigram"]
        for name, loss, perplexity, bits, *_ in table[1:-1]:
            alone = evaluate(f"--out_dir={name}")
            assert float(loss) == pytest.approx(alone["loss"], abs=1e-4)
            assert float(perplexity) == pytest.approx(alone["perplexity"], rel=1e-4)
            assert float(bits) == pytest.approx(alone["bits_per_byte"], abs=1e-4)
        assert float(table[-1][1]) == pytest.approx(naive_bigram(CHARACTERS), abs=1e-4)
    assert (house / "char" / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert (house / "char" / "log.jsonl").stat().st_size == size  # evaluate.py changes nothing in it
    done = harness.run("evaluate.py", "--json", "--compare", "char", "byte", "--plot_file=x.png", cwd=house)
    result = json.loads(done.out)
    assert [run["name"] for run in result["compare"]] == ["char", "byte", "bigram"]
    assert list(result)[: len(KEYS)] == KEYS and result["loss"] == result["compare"][0]["loss"]
    assert result["compare"][1]["params"] == loaded(house / "byte")[0].n_params()


def test_letters_of_the_end_token_in_a_text_are_letters(evaluate, house):
    """Next to a model with an END token, a model of bytes has the loss that it has alone, and the other way round."""
    text = f"a text about {END} and how{END}{END} to split it. " * 3
    for name, tokenizer in (("letters", byte_tokenizer()), ("letters-bpe", train_bpe([text], 290))):
        make_dataset(house / "data" / name, tokenizer, TRAIN, text)
        save(house / name, random_gpt(vocab_size=tokenizer.vocab_size), tokenizer, name)
    for first, second in (("letters", "letters-bpe"), ("letters-bpe", "letters")):
        done = harness.run("evaluate.py", "--json", "--compare", first, second, "--plot_file=x.png", cwd=house)
        alone = [evaluate(f"--out_dir={name}", "--extra") for name in (first, second)]
        for run, wanted in zip(json.loads(done.out)["compare"], alone, strict=False):
            assert {key: run[key] for key in (*KEYS[1:-1], "words")} == pytest.approx(
                {key: wanted[key] for key in (*KEYS[1:-1], "words")}
            )


def test_another_text_under_the_name_of_the_dataset_is_reported(evaluate, house):
    from minutegpt.data.dataset import open_data

    model, tokenizer = loaded(house / "byte")
    now = getattr(open_data("byte", "val", data_dir=house / "data"), "fingerprint", "")
    if not now:
        pytest.skip("datasets have no fingerprint yet")
    save(house / "same", model, tokenizer, "byte", data_fingerprint=now)
    save(house / "changed", model, tokenizer, "byte", data_fingerprint="0123456789abcdef")
    loss = evaluate("--out_dir=same")["loss"]  # and not a word on standard error
    done = harness.run("evaluate.py", "--out_dir=changed", "--json", cwd=house)
    assert done.status == 0 and json.loads(done.out)["loss"] == loss
    assert done.err.startswith("warning: byte holds another text than when changed was trained")
    assert done.err.count("\n") == 1
    make_dataset(house / "data" / "byte-too", tokenizer, TRAIN, VAL)
    done = harness.run("evaluate.py", "--out_dir=changed", "--dataset=byte-too", "--json", cwd=house)
    assert done.status == 0 and not done.err  # asked for by name


def test_gpt2_beside_a_run(house):
    """A GPT-2 of random weights, as transformers saves it: its loss on the run's text, as transformers computes it."""
    transformers = pytest.importorskip("transformers")
    from test_tokenizer import gpt2_shaped

    torch.manual_seed(3)
    shape = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, n_positions=16)  # 50257 words
    theirs = transformers.GPT2LMHeadModel(shape).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.3)
    theirs.save_pretrained(house / "their-gpt2")
    for name, text in zip(("vocab.json", "merges.txt"), gpt2_shaped(), strict=True):
        (house / "their-gpt2" / name).write_text(text, encoding="utf-8")
    tokenizer = gpt2_tokenizer(house / "their-gpt2")
    ids = tokenizer.encode(VAL)
    nats = naive_loss(lambda ids: theirs(ids[None]).logits[0], ids, 16) * (len(ids) - 1)
    argv = ("--compare", "char", "their-gpt2", "--json", "--plot_file=x.png")
    done = harness.run("evaluate.py", *argv, cwd=house)
    assert done.status == 0, done.err
    run, gpt2, _ = json.loads(done.out)["compare"]
    rest = tokenizer.decode_bytes(ids[1:])
    assert gpt2["loss"] == pytest.approx(nats / (len(ids) - 1), abs=1e-4) and gpt2["tokens"] == len(ids) - 1
    assert gpt2["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(rest), rel=1e-4)
    assert gpt2["word_perplexity"] == pytest.approx(math.exp(min(700, nats / len(rest.split()))), rel=1e-2)
    assert run["name"] == "char" and run["words"] == len(VAL.split())
    alone = harness.run("evaluate.py", "--out_dir=their-gpt2", "--dataset=char", "--json", cwd=house)
    assert json.loads(alone.out)["loss"] == pytest.approx(gpt2["loss"], abs=1e-6)
    done = harness.run("evaluate.py", "--out_dir=their-gpt2", cwd=house)
    assert done.status == 2 and "does not record its dataset" in done.err and "--dataset=NAME" in done.err


# ---------------------------------------------------------------------------------------- nanoGPT's checkpoints


CHARACTERS = char_tokenizer(TRAIN + VAL)


def nanogpt_weights(bias, V=CHARACTERS.vocab_size, T=16, C=32, L=2):
    """Random weights under nanoGPT's names, in its order."""
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
    """nanoGPT's forward pass, written again in float64: ids (T,) -> (T, V)."""
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
    """A folder as nanoGPT leaves it, and its weights. Its meta.pkl would end a process that unpickles it."""
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
    model = checkpoint.build_model(checkpoint.load_run(folder)).eval()
    idx = torch.randint(CHARACTERS.vocab_size, (3, 16), generator=torch.Generator().manual_seed(1))
    theirs = torch.stack([nanogpt_logits(weights, row) for row in idx])
    with torch.no_grad():
        assert (model(idx)[0] - theirs).abs().max() < 1e-5 * theirs.abs().max()


def test_evaluate_reads_nanogpts_folder(nanogpt, evaluate):
    folder, weights = nanogpt
    loss = naive_loss(lambda ids: nanogpt_logits(weights, ids), CHARACTERS.encode(VAL), 16)
    assert evaluate(f"--out_dir={folder}", "--dataset=char")["loss"] == pytest.approx(loss, abs=1e-5)


def test_sample_reads_nanogpts_folder(nanogpt, house):
    folder, weights = nanogpt
    argv = (f"--out_dir={folder}", "--dataset=char", "--temperature=0", "--start=take", "--max_new_tokens=12")
    done = harness.run("sample.py", *argv, cwd=house)
    assert done.status == 0, done.err
    ids = CHARACTERS.encode("take")
    for _ in range(12):
        ids.append(int(nanogpt_logits(weights, torch.tensor(ids))[-1].argmax()))
    assert done.out == CHARACTERS.decode(ids) + "\n"


@pytest.mark.parametrize("nanogpt", [(True, "_orig_mod.")], indirect=True)
def test_train_resumes_nanogpts_folder(nanogpt, house, tmp_path):
    """One step at learning rate 0 with their optimizer's state leaves their weights as they were."""
    import shutil

    folder = shutil.copytree(nanogpt[0], tmp_path / "run")
    argv = (f"--out_dir={folder}", "--init_from=resume", "--dataset=char", "--max_iters=4", "--learning_rate=0",
            "--compile=false", "--batch_size=2", "--eval_iters=1",
            "--weight_decay=0", "--gradient_accumulation_steps=1")  # fmt: skip
    done = harness.run("train.py", *argv, cwd=house)
    assert done.status == 0, done.err
    state = checkpoint.load_run(folder)
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
        (["--out_dir=char", "--json=x.json"], ["--json must be true or false", "'x.json'"]),
        (["--out_dir=char", "--stride=17"], ["--stride=17 would skip tokens", "16"]),
        (["--out_dir=char", "--stride=-1", "--batch_size=0"], ["--stride=-1", "--batch_size=0 must be at least 1"]),
        (["--out_dir=char", "--block_size=32"], ["--block_size=32", "learned 16 positions", "rope"]),
        (["--out_dir=char", "--blocksize=32"], ["'blocksize'", "Did you mean block_size"]),
        (["--out_dir=char", "--device=gpu"], ["--device=gpu is not on this machine", "cpu"]),
        (["--out_dir=torn"], ["torn", "damaged or not a checkpoint"]),
        (["--out_dir=nan"], ["the loss", "is nan", "not finite"]),
        (["--compare", "char", "nowhere"], ["no checkpoint in nowhere", "here: "]),
        (["--compare"], ["--compare has no value"]),
        (["--compare", "rope", "char", "--block_size=32"], ["learned 16 positions", "rope"]),
        (["--out_dir=char", "--plot_file=no/x.png"], ["--plot_file=no/x.png", "no folder no", "another"]),
        (["--out_dir=char", "--memorization_tokens=-1"], ["--memorization_tokens=-1 must be at least 0"]),
        (["--out_dir=byte", "--dataset=one"], ["the val split of one has 1 token", "more text"]),
    ],
)
def test_a_mistake_is_told_and_nothing_else(house, argv, words):
    if not (house / "torn").exists():
        (house / "torn").mkdir()
        (house / "torn" / "ckpt.pt").write_bytes((house / "char" / "ckpt.pt").read_bytes()[:-100])
        broken = random_gpt(vocab_size=256)
        torch.nn.init.constant_(broken.lm_head.weight, np.nan)
        save(house / "nan", broken, byte_tokenizer(), "byte")
        make_dataset(house / "data" / "one", byte_tokenizer(), TRAIN, "x")
    done = harness.run("evaluate.py", *argv, cwd=house)
    assert done.status == 2 and done.out == ""
    assert done.err.count("error: ") == 1 and "Traceback" not in done.err
    assert all(word in done.err for word in words), done.err
