"""minutegpt/page/engine.js: Node computes the logits that model.py computes with the same rounded weights."""

import base64
import json
import os
import shutil
import subprocess
from dataclasses import asdict
from typing import Any

import pytest
import torch
from harness import ROOT
from torch import nn

from minutegpt.page.pack import pack_model, page_weights
from minutegpt.quantize import unpack
from model import GPT, GPTConfig

PAGE = ROOT / "minutegpt" / "page"
SIZE = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 24, "vocab_size": 61}
FAST = {"pos": "rope", "norm": "rmsnorm", "qk_norm": True, "tie": False, "softcap": 15.0}
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
    "softcap": {"softcap": 3.0},
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


def node(script: str, value: Any, *files: str) -> Any:
    """Runs a script after the named files of the page, with `input`; returns what it passed to `output`."""
    program = shutil.which("node")
    if program is None:
        if os.environ.get("MINUTEGPT_NO_SKIP"):
            pytest.fail("node is not installed, and MINUTEGPT_NO_SKIP is set")
        pytest.skip("node is not installed")
    source = "".join((PAGE / name).read_text(encoding="utf-8") for name in files)
    read = "const input = JSON.parse(require('fs').readFileSync(0, 'utf-8'));\n"
    write = "const output = (value) => process.stdout.write(JSON.stringify(value));\n"
    done = subprocess.run(
        [program, "-e", source + read + write + script], input=json.dumps(value), capture_output=True,
        encoding="utf-8", timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


LOGITS = """
output(input.map(({ config, tensors, weights, tokens, greedy }) => {
  const bytes = new Uint8Array(Buffer.from(weights, "base64"));
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
  const base64 = (array) => Buffer.from(array.buffer).toString("base64");
  return { logits: base64(logits), one_by_one: base64(one_by_one), text, attention: attention.map(base64) };
}));
"""


def floats(packed: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(packed)), dtype=torch.float32)


@pytest.fixture(scope="module")
def answers() -> dict[tuple[str, str], tuple[GPT, list[int], dict[str, Any]]]:
    """Block and dtype -> the model with rounded weights, tokens, what Node computed. One process for all."""
    cases, questions = {}, []
    for name, dtype in CASES:
        model = make(**BLOCKS[name])
        config = model.config
        draw = torch.Generator().manual_seed(2)
        T, greedy = (config.block_size, 200) if config.vocab_size < 1000 else (12, 30)
        tokens = torch.randint(config.vocab_size, (T,), generator=draw).tolist()
        questions.append(case(model, dtype, tokens=tokens, greedy=greedy))
        cases[name, dtype] = (rounded(model, dtype), tokens)
    found = node(LOGITS, questions, "engine.js", "weights.js")
    return {key: (*cases[key], answer) for key, answer in zip(cases, found, strict=True)}


@pytest.mark.parametrize(("name", "dtype"), CASES)
@torch.no_grad()
def test_logits_of_each_block_are_those_of_model_py(answers, name, dtype):
    model, tokens, answer = answers[name, dtype]
    idx = torch.tensor([tokens])
    wanted = model(idx)[0][0]  # (T, V)
    for key in ("logits", "one_by_one"):
        found = floats(answer[key]).view(wanted.shape)
        assert (found - wanted).abs().max() <= 1e-3 * wanted.abs().max(), key
    n = len(answer["text"]) - 1
    assert answer["text"] == model.generate(idx[:, :1], n, temperature=0)[0].tolist()  # many contexts long


@torch.no_grad()
def test_attention_weights_are_those_of_the_formula(answers):
    """Of the first layer of the classic block."""
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
