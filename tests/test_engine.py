"""minutegpt/page/engine.js: Node computes the logits that model.py computes with the same rounded weights."""

import base64
from dataclasses import asdict
from typing import Any

import pytest
import torch
from browser import Browser
from javascript import chromium, need_chromium, node, sources
from torch import nn

from minutegpt.page.pack import pack_model, page_weights
from minutegpt.quantize import unpack
from model import GPT, GPTConfig

SIZE = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 24, "vocab_size": 61}
FAST = {"pos": "rope", "norm": "rmsnorm", "qk_norm": True, "tie": False}
BLOCKS: dict[str, dict[str, Any]] = {  # each block and option of model.py
    "classic": {},
    "gpt2": {"bias": True, "activation": "gelu_tanh"},
    "rope": {"pos": "rope"},
    "rmsnorm": {"norm": "rmsnorm"},
    "post norm": {"norm_position": "post"},
    "post norm, rmsnorm, bias": {"norm_position": "post", "norm": "rmsnorm", "bias": True},
    "relu": {"activation": "relu"},
    "relu2": {"activation": "relu2"},
    "qk_norm": {"qk_norm": True},
    "untied": {"tie": False},
    "grouped queries": {"n_kv_head": 2, "pos": "rope"},
    "one key-value head": {"n_kv_head": 1, "bias": True},
    "odd sizes": {"n_layer": 1, "n_head": 3, "n_embd": 9, "block_size": 7, "vocab_size": 5},
    "fast": FAST,
    "n-grams": FAST | {"ngram": 6, "ngram_rows": 4096},
    "n-grams of a large vocabulary": {"ngram": 8, "ngram_rows": 1000, "vocab_size": 50257, "n_embd": 8, "n_layer": 1},
    "n-grams that all fit": {"ngram": 3, "ngram_rows": 17**3, "vocab_size": 17},
    "experts": {"n_expert": 5, "n_expert_active": 2},
    "fast, with experts": FAST | {"n_expert": 4, "n_expert_active": 3, "activation": "relu2", "ngram": 3},
    "context of one": {"block_size": 1},
}
CASES = [(name, "int8") for name in BLOCKS] + [(name, "float16") for name in ("gpt2", "n-grams", "experts")]


def make(seed: int = 1, **settings: Any) -> GPT:
    """A model whose every weight matters. Half of the rows of its n-gram tables are zero."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**(SIZE | settings))).eval()
    for name, p in model.named_parameters():
        nn.init.normal_(p, std=0.3)
        if ".ngrams." in name:
            p.data[torch.rand(len(p)) < 0.5] = 0
    for name, buffer in model.named_buffers():
        if name.endswith("router_bias"):
            nn.init.normal_(buffer, std=0.3)
    return model


def rounded(model: GPT, dtype: str) -> GPT:
    """The model with the weights that the page has, in float32."""
    weights = {name: w.float() for name, w in unpack(page_weights(model, dtype)).items()}
    weights.setdefault("transformer.wte.weight", weights["lm_head.weight"])
    reference = GPT(model.config).eval()
    reference.load_state_dict(weights)
    return reference


def case(model: GPT, dtype: str = "int8", **values: Any) -> dict[str, Any]:
    """The model and values as JSON, for a script in JavaScript."""
    tensors, content = pack_model(model, dtype)
    packed = base64.b64encode(content).decode()
    return {"config": asdict(model.config), "tensors": tensors, "weights": packed, **values}


LOGITS = """
output(input.map(({ config, tensors, weights, tokens, greedy }) => {
  const bytes = Uint8Array.from(atob(weights), (c) => c.charCodeAt(0));
  const load = () => new GPT(config, readWeights(tensors, bytes));
  const whole = load();
  const attention = [];
  const logits = whole.unembed(whole.hidden(tokens, attention), tokens.length);  // at once, as a prompt
  const single = load();
  const one_by_one = new Float32Array(logits.length);  // through the cache
  tokens.forEach((_, t) => one_by_one.set(single.next(tokens.slice(0, t + 1)), t * config.vocab_size));
  const text = tokens.slice(0, 1);
  const writer = load();
  for (let i = 0; i < greedy; i++) text.push(draw(probabilities(writer.next(text), { temperature: 0 }), 0.5));
  const base64 = (array) => btoa(Array.from(new Uint8Array(array.buffer), (b) => String.fromCharCode(b)).join(""));
  return { logits: base64(logits), one_by_one: base64(one_by_one), text, attention: attention.map(base64) };
}));
"""


def floats(packed: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(packed)), dtype=torch.float32)


Answer = tuple[GPT, list[int], dict[str, Any]]  # the model with rounded weights, tokens, what JavaScript computed


@pytest.fixture(scope="module")
def questions() -> dict[tuple[str, str], tuple[GPT, list[int], dict[str, Any]]]:
    """Block and dtype -> the model with rounded weights, tokens, and both as JSON."""
    found = {}
    for name, dtype in CASES:
        model = make(**BLOCKS[name])
        config = model.config
        draw = torch.Generator().manual_seed(2)
        T, greedy = (config.block_size, 200) if config.vocab_size < 1000 else (12, 30)
        tokens = torch.randint(config.vocab_size, (T,), generator=draw).tolist()
        found[name, dtype] = (rounded(model, dtype), tokens, case(model, dtype, tokens=tokens, greedy=greedy))
    return found


@pytest.fixture(scope="module")
def answers(questions) -> dict[tuple[str, str], Answer]:
    """What Node computed, in one process for all."""
    found = node(LOGITS, [question for *_, question in questions.values()], "engine.js", "weights.js")
    return {key: (*questions[key][:2], answer) for key, answer in zip(questions, found, strict=True)}


@torch.no_grad()
def check(model: GPT, tokens: list[int], answer: dict[str, Any]) -> None:
    idx = torch.tensor([tokens])
    wanted = model(idx)[0][0]  # (T, V)
    for key in ("logits", "one_by_one"):
        found = floats(answer[key]).view(wanted.shape)
        assert (found - wanted).abs().max() <= 1e-3 * wanted.abs().max(), key
    n = len(answer["text"]) - 1
    assert answer["text"] == model.generate(idx[:, :1], n, temperature=0)[0].tolist()  # many contexts long


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_logits_of_each_block_are_those_of_model_py(answers, name, dtype):
    check(*answers[name, dtype])


@pytest.mark.slow
def test_logits_in_chromium_are_those_of_model_py(questions, tmp_path):
    need_chromium()
    (tmp_path / "empty.html").write_text("<!doctype html>")
    with Browser() as browser:
        page = browser.open(tmp_path / "empty.html")
        for model, tokens, question in questions.values():
            check(model, tokens, chromium(page, LOGITS, [question], "engine.js", "weights.js")[0])
        assert not page.problems


@torch.no_grad()
def test_attention_weights_are_those_of_the_formula(answers):
    """In the first layer of the classic block."""
    model, tokens, answer = answers["classic", "int8"]
    C, T = model.config.n_embd, len(tokens)
    block = model.transformer.h[0]
    x = block.ln_1(model.transformer.wte(torch.tensor(tokens)) + model.transformer.wpe.weight)  # (T, C)
    q, k, _ = (part.view(T, 4, C // 4).transpose(0, 1) for part in block.attn.c_attn(x).split(C, dim=1))  # (H, T, D)
    scores = q @ k.transpose(1, 2) / (C // 4) ** 0.5
    scores.masked_fill_(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf)
    found = floats(answer["attention"][0]).view(4, T, T)
    torch.testing.assert_close(found, scores.softmax(-1), atol=1e-5, rtol=1e-4)
    assert len(answer["attention"]) == model.config.n_layer


PREFIXES = """
const [{ config, tensors, weights, texts }] = input;
const bytes = Uint8Array.from(atob(weights), (c) => c.charCodeAt(0));
const cached = new GPT(config, readWeights(tensors, bytes));
const read = [];
const hidden = cached.hidden;
cached.hidden = function (tokens, ...rest) { read.push(tokens.length); return hidden.call(this, tokens, ...rest); };
output(texts.map((tokens) => {
  read.length = 0;
  let logits = null;
  while (!logits) logits = cached.next(tokens, 5);
  const fresh = new GPT(config, readWeights(tensors, bytes)).next(tokens);
  return { same: logits.every((value, i) => value === fresh[i]), read: read.slice() };
}));
"""


def test_only_what_is_new_is_read():
    """After any other text the logits are those of a new model, in every bit; the cache saves what both begin with."""
    model = make(**BLOCKS["n-grams"])  # block_size 24
    text = torch.randint(61, (60,), generator=torch.Generator().manual_seed(3)).tolist()
    other = [*text[:7], 60 - text[7], *text[8:12]]
    texts = [text[:12], text[:13], text[:12], other, text[:30], text[:31], text[:60], text[:1]]
    answers = node(PREFIXES, [case(model, texts=texts)], "engine.js", "weights.js")
    assert all(answer["same"] for answer in answers)
    # at most five tokens at once; of a text that was read, the last token; from the first that differs; a context
    # that is longer than 24 tokens begins at a multiple of 13, as in GPT.stream
    wanted = [[5, 5, 2], [1], [1], [5], [5, 5, 5, 2], [1], [5, 5, 5, 5, 1], [1]]
    assert [answer["read"] for answer in answers] == wanted


DRAWS = """
const p = Float32Array.from([0.5, 0, 0.25, 0.25]), random = uniform(7), counts = [0, 0, 0, 0];
for (let i = 0; i < 40000; i++) counts[draw(p, random())]++;
const first = (seed) => { const random = uniform(seed); return [random(), random(), random()]; };
output({
  counts, seeds: [first(1), first(1), first(2)],
  options: input.options.map((options) => [...probabilities(Float32Array.from(input.logits), options)]),
  last: draw(Float32Array.from([0.3, 0.3, 0]), 0.9999),
});
"""


def test_draws_follow_the_probabilities_of_model_py():
    logits = torch.randn(20, generator=torch.Generator().manual_seed(4))
    options = [{}, {"temperature": 0.5}, {"temperature": 0}, {"top_k": 3}, {"top_k": 1}, {"temperature": 2, "top_k": 5}]
    answer = node(DRAWS, {"logits": logits.tolist(), "options": options}, "engine.js", "weights.js")
    for found, settings in zip(answer["options"], options, strict=True):
        scaled = logits / max(settings.get("temperature", 1), 1e-9)
        k = settings.get("top_k", 20)
        wanted = scaled.masked_fill(scaled < scaled.topk(k).values[-1], -torch.inf).softmax(0)
        torch.testing.assert_close(torch.tensor(found, dtype=torch.float32), wanted, atol=1e-6, rtol=1e-4)
    expected = torch.tensor([20000, 0, 10000, 10000])
    assert (torch.tensor(answer["counts"]) - expected).abs().max() < 500 and answer["counts"][1] == 0
    one, same, other = answer["seeds"]
    assert one == same != other and len({*one}) == 3
    assert answer["last"] == 1  # the sum was below 1, and an impossible token is never drawn


def test_the_engine_is_short():
    """It is for reading, next to model.py."""
    lines = sources("engine.js").splitlines()
    assert len(lines) <= 250 and max(map(len, lines)) <= 120
