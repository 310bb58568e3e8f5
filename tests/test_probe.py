"""minutegpt/probe.py: attention is what the model computes; labels go to heads that were built to have them."""

import base64
import copy

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from minutegpt import probe
from minutegpt.quantize import fake_quantize
from model import GPT, GPTConfig, attention_by_hand, causal_attention

BLOCKS = {
    "learned": {},
    "rope": {"pos": "rope"},
    "gqa": {"n_kv_head": 2, "pos": "rope"},
    "qk_norm": {"qk_norm": True, "norm": "rmsnorm"},
    "post": {"norm_position": "post"},
    "experts": {"n_expert": 4, "n_expert_active": 2},
    "ngrams": {"ngram": 3, "ngram_rows": 50},
    "untied": {"tie": False, "bias": True, "dropout": 0.3},
}


def make(seed: int = 0, scale: float = 1.0, **changes) -> GPT:
    torch.manual_seed(seed)
    settings = {"block_size": 24, "vocab_size": 19, "n_layer": 2, "n_head": 4, "n_embd": 32} | changes
    model = GPT(GPTConfig(**settings))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale)
    return model


def tokens(n: int, V: int = 19) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(1).integers(V, size=n))


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("how", ["float32", "autocast", "qat"])
def test_the_weights_are_the_attention_of_the_model(block, how):
    model, idx = make(scale=8.0, **BLOCKS[block]), tokens(24)[None]
    if how == "qat":
        fake_quantize(model, "int8")
    seen = []

    def attend(q, k, v):  # the formula in model.py, with one unit vector per position as values
        H, T = q.shape[1:3]
        all_k = k.float().repeat_interleave(H // k.size(1), dim=1)
        seen.append(attention_by_hand(q.float(), all_k, torch.eye(T).expand(1, H, T, T)))
        return causal_attention(q, k, v)

    model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        expected, _ = model(idx)
        logits, weights = probe.forward_with_attention(model, idx)
        for layer in model.transformer.h:
            layer.attn.attend = attend
        model(idx)
    assert torch.equal(logits, expected)  # looking changes nothing
    assert len(weights) == len(seen) == 2
    for found, formula in zip(weights, seen, strict=True):
        assert found.shape == (1, 4, 24, 24)
        torch.testing.assert_close(found, formula, atol=1e-6, rtol=1e-5)
        assert torch.equal(found, found.tril())


def test_an_attention_that_was_replaced_is_used_and_stays():
    """truth.py replaces it where this device computes it wrong."""
    model, calls = make(), []

    def attend(q, k, v):
        calls.append(1)
        return causal_attention(q, k, v)

    for layer in model.transformer.h:
        layer.attn.attend = attend
    probe.read_passage(model, tokens(25))
    assert len(calls) == 2
    probe.forward_without(model, tokens(24)[None], 0, 0)
    assert len(calls) == 4 and all(layer.attn.attend is attend for layer in model.transformer.h)


@pytest.mark.parametrize("block", BLOCKS)
def test_nothing_is_changed_by_a_look(block):
    model = make(**BLOCKS[block]).train()
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    numpy_random = np.random.get_state()[1].tolist()
    probe.read_passage(model, tokens(25))
    assert probe.score_heads(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert np.random.get_state()[1].tolist() == numpy_random
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for module in model.modules():
        assert module.training and "attend" not in vars(module)
        assert not int(getattr(module, "tokens_per_expert", torch.zeros(1)).sum())  # of experts
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_failed_look_leaves_the_model_as_it_was():
    model = make().train()
    with pytest.raises(IndexError):
        probe.read_passage(model, torch.full((10,), 999))
    assert all(module.training and "attend" not in vars(module) for module in model.modules())


def test_a_passage_is_read_as_an_evaluation_reads_it():
    model, ids = make(scale=4.0), tokens(25)
    found = probe.read_passage(model, ids)
    with torch.no_grad():
        logits, loss = model.eval()(ids[None, :-1], ids[None, 1:])
    assert found.loss.mean().item() == pytest.approx(loss.item(), rel=1e-5)
    p = logits[0].softmax(-1)
    assert torch.equal(found.top_ids[:, 0], logits[0].argmax(-1))
    torch.testing.assert_close(found.top_probs, p.sort(descending=True).values[:, :5])
    torch.testing.assert_close(found.loss, -p[range(24), ids[1:]].log())


def test_ids_without_a_text_are_never_among_the_likeliest():
    found = probe.read_passage(make(scale=4.0), tokens(20, 9), 9)
    assert found.top_ids.max() < 9 and found.top_ids.shape == (19, 5)
    assert probe.read_passage(make(), tokens(20, 3), 3).top_ids.shape == (19, 3)


# ---------------------------------------------------------------------------------------- labels


V, T = 20, 40


def built(previous: bool = True, induction: bool = True, writes: bool = True) -> GPT:
    """A model whose weights are set by hand. Head 0.0 reads the token before. Head 1.1 finds where the present token
    was the token before, and writes the token there into the logits; with writes=False it looks and writes nothing.

    The channels are four blocks: the token, the position, the token before, the answer. Each is a unit vector.
    """
    model = make(vocab_size=V, block_size=T, n_head=2, n_embd=3 * V + T, norm="rmsnorm", tie=False)
    C, D = 3 * V + T, (3 * V + T) // 2
    token, position, before, answer = slice(0, V), slice(V, V + T), slice(V + T, 2 * V + T), slice(2 * V + T, C)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.transformer.wte.weight[:, token] = torch.eye(V)
        model.transformer.wpe.weight[:, position] = torch.eye(T)
        model.lm_head.weight[:, answer] = 3 * torch.eye(V)
        if previous:
            attn = model.transformer.h[0].attn  # rows of c_attn: queries of both heads, keys, values
            attn.c_attn.weight[0 : T - 1, position] = 5 * torch.eye(T)[1:]  # position t asks for t - 1
            attn.c_attn.weight[C : C + T, position] = torch.eye(T)
            attn.c_attn.weight[2 * C : 2 * C + V, token] = torch.eye(V)
            attn.c_proj.weight[before, 0:V] = torch.eye(V)
        if induction:
            attn = model.transformer.h[1].attn
            attn.c_attn.weight[D : D + V, token] = 8 * torch.eye(V)
            attn.c_attn.weight[C + D : C + D + V, before] = torch.eye(V)
            attn.c_attn.weight[2 * C + D : 2 * C + D + V, token] = torch.eye(V)
            attn.c_proj.weight[answer, D : D + V] = float(writes) * torch.eye(V)
    return model


def test_heads_that_are_built_to_have_a_label_have_it_and_no_others():
    scores = probe.score_heads(built())
    assert scores["previous_token"][0][0] > 0.95 and scores["induction"][1][1] > 0.9
    assert scores["copy_gain"][1][1] > 1.0
    assert probe.labels_of(scores) == {("previous_token", 0, 0), ("induction", 1, 1)}


def test_a_head_that_looks_at_the_right_place_and_says_nothing_has_not_learned_to_copy():
    scores = probe.score_heads(built(writes=False))
    assert scores["induction"][1][1] > 0.9
    assert probe.labels_of(scores) == {("previous_token", 0, 0)}


def test_without_the_previous_token_there_is_no_induction():
    assert probe.labels_of(probe.score_heads(built(previous=False))) == set()
    assert probe.labels_of(probe.score_heads(built(induction=False))) == {("previous_token", 0, 0)}


@pytest.mark.parametrize("scale", [1.0, 5.0, 20.0])
@pytest.mark.parametrize("block", ["learned", "rope", "qk_norm", "post"])
def test_a_random_model_has_no_labels(block, scale):
    for seed in range(5):
        scores = probe.score_heads(make(seed, scale, **BLOCKS[block]))
        assert probe.labels_of(scores) == set(), scores


def trained_on(repeats: int, steps: int) -> list[tuple[int, dict]]:
    """Scores every 100 steps of a model that learns random tokens. Each row repeats a sequence of 8 to 24 tokens."""
    model = make(n_head=2, n_embd=64, block_size=48, vocab_size=24, pos="rope", norm="rmsnorm", tie=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0)
    random, measured = np.random.default_rng(0), []
    for step in range(steps + 1):
        if step % 100 == 0:
            measured.append((step, probe.score_heads(model)))
        n = random.integers(8, 25)
        parts = [[random.choice(24, n, replace=False) for _ in range(-(-49 // n))] for _ in range(32)]
        rows = [np.concatenate(part[:1] * len(part) if repeats else part)[:49] for part in parts]
        x = torch.from_numpy(np.stack(rows))
        loss = model(x[:, :-1], x[:, 1:])[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return measured


@pytest.mark.slow
def test_heads_learn_to_copy_where_the_text_repeats_and_nowhere_else():
    """It takes two layers (arXiv 2209.11895): a head of the first reads the token before, one of the second copies."""
    measured = trained_on(repeats=True, steps=400)
    born = [birth for birth in probe.births(measured) if birth["label"] == "induction"]
    assert born and all(birth["layer"] == 1 and birth["step"] >= 100 for birth in born)
    assert max(measured[-1][1]["previous_token"][0]) > 3 * max(measured[-1][1]["previous_token"][1])
    assert probe.births(trained_on(repeats=False, steps=200)) == []


def test_the_scores_of_uniform_attention_are_known():
    model = make(vocab_size=30)
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_attn.weight.zero_()
    scores = probe.score_heads(model)
    n = 12  # half of the context
    previous = np.mean([1 / (t + 1) for t in range(1, 2 * n)])
    induction = np.mean([1 / (t + 1) for t in range(n, 2 * n)])
    assert np.allclose(scores["previous_token"], previous, atol=6e-4)
    assert np.allclose(scores["induction"], induction, atol=6e-4)


def test_scores_are_the_same_every_time_and_short_contexts_have_none():
    assert probe.score_heads(make()) == probe.score_heads(make())
    assert probe.score_heads(make(block_size=7)) == {} == probe.score_heads(make(vocab_size=3))
    assert probe.score_heads(make(block_size=8))


def test_the_output_of_one_head_can_be_left_out():
    model, idx = make(scale=6.0), tokens(20)[None]
    changed = copy.deepcopy(model).eval()
    with torch.no_grad():
        changed.transformer.h[1].attn.c_proj.weight[:, 2 * 8 : 3 * 8] = 0  # reads the output of head 2
        torch.testing.assert_close(probe.forward_without(model, idx, 1, 2), changed(idx)[0])


def scores_with(*labels: tuple[str, int, int]) -> dict[str, list[list[float]]]:
    scores = {name: [[0.0, 0.0], [0.0, 0.0]] for name in ("previous_token", "induction", "copy_gain")}
    for name, layer, head in labels:
        for key in (name, "copy_gain") if name == "induction" else (name,):
            scores[key][layer][head] = 0.9
    return scores


def test_a_head_is_born_where_it_has_its_label_from_then_on():
    a, b = ("previous_token", 0, 1), ("induction", 1, 0)
    rows = [
        (0, scores_with()),
        (10, scores_with(a)),
        (20, scores_with()),
        (30, scores_with(a)),
        (40, scores_with(a, b)),
    ]
    born = probe.births(rows)
    assert [probe.birth_line(birth) for birth in born] == [
        "step 30: head 0.1 looks at the token before",
        "step 40: head 1.0 has learned to copy",
    ]
    assert probe.births([*rows, (50, scores_with(b))]) == born[1:]
    assert probe.births([]) == []


# ---------------------------------------------------------------------------------------- rows


def test_scores_come_back_from_a_row_of_the_log():
    scores = probe.score_heads(built())
    row = {"step": 3, "val_loss": 2.0, **probe.to_row(scores)}
    assert all(isinstance(value, float | int) for value in row.values())
    assert row["induction/1.1"] == scores["induction"][1][1] and "copy_gain/0.0" not in row
    assert probe.from_row(row, 2, 2) == scores
    assert probe.from_row({"step": 3}, 2, 2) == {} == probe.to_row({})


def test_a_passage_comes_back_from_a_row_of_the_samples():
    found = probe.read_passage(make(scale=8.0), tokens(25))
    row = probe.passage_row(found)
    n = row["attention_tokens"]
    assert n == 24 and np.allclose(row["loss"], found.loss, atol=6e-4)
    assert [top[::2] for top in row["top"]] == found.top_ids.tolist()
    assert np.allclose([top[1::2] for top in row["top"]], 1000 * found.top_probs, atol=0.51)
    raw = np.frombuffer(base64.b64decode(row["attention"]), np.uint8)
    size = n * (n + 1) // 2
    assert len(raw) == 2 * 4 * size
    for layer in range(2):
        for head in range(4):
            kept = raw[(layer * 4 + head) * size :][:size] / 255
            expected = found.attention[layer][head].numpy()[np.tril_indices(n)]
            assert np.allclose(kept, expected, atol=0.0021)


@pytest.mark.parametrize("n_heads", [1, 8, 36, 144, 2304, 10**6])
def test_the_attention_of_any_number_of_heads_fits(n_heads):
    n = probe.attention_tokens(n_heads, 160)
    assert 1 <= n <= 64
    assert n == 1 or n_heads * n * (n + 1) // 2 <= probe.ATTENTION_BYTES


@pytest.mark.slow
def test_a_compiled_model_is_not_compiled_again():
    from torch._dynamo.testing import CompileCounter

    torch.compiler.reset()  # other tests' models count towards one limit of recompilations, and then the graph breaks
    model, counter = make(), CompileCounter()
    compiled = torch.compile(model, backend=counter)
    x, y = tokens(24)[None], tokens(24)[None]
    compiled(x, y)
    before = counter.frame_count
    for _ in range(3):
        probe.read_passage(model, tokens(25))
        probe.score_heads(model)
        compiled(x, y)[1].backward()
    assert counter.frame_count == before == 1


def test_cross_entropy_of_the_repeated_half():
    idx = torch.tensor([[1, 2, 3, 1, 2, 3]])
    logits = torch.full((1, 6, 4), -20.0)
    logits[0, [3, 4], [2, 3]] = 20.0  # at the second 1 and 2 it knows what comes
    assert probe.repeat_loss(logits, idx).item() == pytest.approx(0, abs=1e-6)
    uniform = F.cross_entropy(torch.zeros(1, 4), torch.tensor([0])).item()
    assert probe.repeat_loss(torch.zeros(1, 6, 4), idx).item() == pytest.approx(uniform)
