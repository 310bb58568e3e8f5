"""Looks inside a model at an evaluation: what surprises it, and what its attention heads do. For the page run.html.

    found = read_passage(model, ids)  # loss and likeliest tokens at each position, and the attention of each head
    scores = score_heads(model, n_tokens)  # on random tokens that are repeated once
    births(rows)  # of log.jsonl -> [{"step": 340, "layer": 2, "head": 1, "label": "induction"}, ...]

Scores of a head, from 0 to 1:

    previous_token   its mean attention to the token before
    induction        its mean attention to the token that came after the same token earlier: "A B ... A" -> B

An attention pattern shows where a head looks, not what it does with it. So the label "induction" asks for more: without
the head, the model predicts the repeated tokens worse by at least COPY_GAIN nats per token.
Source: Olsson et al., In-context Learning and Induction Heads, arXiv 2209.11895.

Nothing here draws from the random state of the training run, and nothing changes the model.
"""

import base64
import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from model import GPT, CausalSelfAttention

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # like model.causal_attention

ROWS, REPEATED = 2, 48  # rows of random tokens; tokens that are repeated, at most
PREVIOUS, INDUCTION = 0.5, 0.4  # scores from which a head has the label
COPY_GAIN = 0.1  # nats per token that a head with the label induction saves
CANDIDATES = 8  # heads with the highest induction score, whose gain is measured
TOP = 5  # likeliest tokens
ATTENTION_BYTES = 1 << 16  # of all heads together; the passage is cut to what fits
LABELS = {"previous_token": "looks at the token before", "induction": "has learned to copy"}


class Passage(NamedTuple):
    """loss (T,), in nats. top: ids (T, 5) and probabilities (T, 5). attention: of each layer, (H, T, T)."""

    loss: Tensor
    top_ids: Tensor
    top_probs: Tensor
    attention: list[Tensor]


def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(D)), causal, in float32: q (B, H, T, D), k (B, H_kv, T, D) -> (B, H, T, T)."""
    T, D = q.shape[-2:]
    k = k.repeat_interleave(q.size(1) // k.size(1), dim=1)  # grouped queries: heads share keys
    scores = q.float() @ k.float().mT / math.sqrt(D)  # (B, H, T, T)
    past = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
    return scores.masked_fill(~past, -math.inf).softmax(-1)


@contextlib.contextmanager
def attend_with(model: GPT, make: Callable[[int, Attention], Attention]) -> Iterator[None]:
    """In the block, the attention of layer i is make(i, its own), and the model is in eval mode, without gradients."""
    layers = [module for module in model.modules() if isinstance(module, CausalSelfAttention)]
    replaced, training = [vars(layer).get("attend") for layer in layers], model.training  # by truth.py, or None
    model.eval()
    try:
        for layer in layers:
            layer.attend = make(layer.layer, layer.attend)  # type: ignore[method-assign, assignment]
        with torch.no_grad():
            yield
    finally:
        for layer, attend in zip(layers, replaced, strict=True):
            if attend:
                layer.attend = attend  # type: ignore[method-assign]
            else:
                vars(layer).pop("attend", None)
        model.train(training)


def forward_with_attention(model: GPT, idx: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits (B, T, V) as the model computes them, and the attention weights of each layer, (B, H, T, T)."""
    weights: list[Tensor] = []

    def recorder(layer: int, own: Attention) -> Attention:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            weights.append(attention_weights(q, k))
            return own(q, k, v)

        return attend

    with attend_with(model, recorder):
        logits, _ = model(idx)
    return logits, weights


def read_passage(model: GPT, ids: Tensor, n_tokens: int = 0) -> Passage:
    """What the model makes of a text, ids (T + 1,). n_tokens: the ids that have a text; 0 = all of the vocabulary."""
    logits, attention = forward_with_attention(model, ids[None, :-1])
    loss = F.cross_entropy(logits[0], ids[1:], reduction="none")  # (T,)
    probs, top = logits[0].softmax(-1)[:, : n_tokens or None].topk(min(TOP, n_tokens or logits.size(-1)))  # (T, 5) each
    return Passage(loss, top, probs, [weights[0] for weights in attention])


def score_heads(model: GPT, n_tokens: int = 0, seed: int = 0) -> dict[str, list[list[float]]]:
    """The scores of every head, [layer][head]: previous_token, induction, and copy_gain in nats per token.

    copy_gain is measured for the heads with the highest induction scores; it is 0 for the others.
    n_tokens: the ids to draw from; 0 = all of the vocabulary. Returns {} for a context of less than 8 tokens.
    """
    V = n_tokens or model.config.vocab_size
    n = min(model.config.block_size // 2, REPEATED, V)
    if n < 4:
        return {}
    random = np.random.default_rng(seed)
    tokens = np.stack(
        [random.choice(V, n, replace=False) for _ in range(ROWS)]
    )  # no token twice: one place to copy from
    idx = torch.from_numpy(np.concatenate((tokens, tokens), axis=1)).to(model.lm_head.weight.device)  # (B, 2n)
    logits, layers = forward_with_attention(model, idx)
    attention = torch.stack(layers)  # (L, B, H, 2n, 2n)
    previous = attention.diagonal(-1, -2, -1).mean((1, -1))  # (L, H): from t to t - 1
    induction = attention.diagonal(1 - n, -2, -1)[..., 1:].mean((1, -1))  # (L, H): from t >= n to t - n + 1
    gain = torch.zeros_like(induction)
    loss = repeat_loss(logits, idx)
    H = induction.size(1)
    for i in induction.flatten().argsort(descending=True)[:CANDIDATES].tolist():
        if induction[i // H, i % H] >= INDUCTION:
            gain[i // H, i % H] = repeat_loss(forward_without(model, idx, i // H, i % H), idx) - loss
    scores = {"previous_token": previous, "induction": induction, "copy_gain": gain}
    return {name: [[round(x, 3) for x in row] for row in values.tolist()] for name, values in scores.items()}


def repeat_loss(logits: Tensor, idx: Tensor) -> Tensor:
    """Mean loss of the tokens that an earlier one predicts: those of the second half, but for its first."""
    n = idx.size(1) // 2
    return F.cross_entropy(logits[:, n:-1].flatten(0, 1), idx[:, n + 1 :].flatten())


def forward_without(model: GPT, idx: Tensor, layer: int, head: int) -> Tensor:
    """The logits of the model with the output of one head set to zero."""

    def make(i: int, own: Attention) -> Attention:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            y = own(q, k, v)  # (B, H, T, D)
            keep = torch.ones(y.size(1), 1, 1, dtype=y.dtype, device=y.device)
            keep[head] = 0
            return y * keep

        return attend if i == layer else own

    with attend_with(model, make):
        return model(idx)[0]


# -- labels


def labels_of(scores: dict[str, list[list[float]]]) -> set[tuple[str, int, int]]:
    """(label, layer, head) of each head whose scores bear a label out."""
    found = set()
    for layer, row in enumerate(scores.get("induction", [])):
        for head, induction in enumerate(row):
            if induction >= INDUCTION and scores["copy_gain"][layer][head] >= COPY_GAIN:
                found.add(("induction", layer, head))
            if scores["previous_token"][layer][head] >= PREVIOUS:
                found.add(("previous_token", layer, head))
    return found


def births(measured: Sequence[tuple[int, dict[str, list[list[float]]]]]) -> list[dict[str, Any]]:
    """Heads that have a label now, with the step since when they have had it without a break.

    measured: (step, scores) of each evaluation.
    """
    since: dict[tuple[str, int, int], int] = {}
    for step, scores in measured:
        since = {found: since.get(found, step) for found in sorted(labels_of(scores))}
    found = [
        {"step": step, "layer": layer, "head": head, "label": label} for (label, layer, head), step in since.items()
    ]
    return sorted(found, key=lambda birth: birth["step"])


def birth_line(birth: dict[str, Any]) -> str:
    return f"step {birth['step']}: head {birth['layer']}.{birth['head']} {LABELS[birth['label']]}"


# -- rows of log.jsonl and samples.jsonl


def to_row(scores: dict[str, list[list[float]]]) -> dict[str, float]:
    """Scores as keys of a row in log.jsonl: {"induction/2.1": 0.03, ...}. copy_gain is left out where it is 0."""
    return {
        f"{name}/{layer}.{head}": value
        for name, layers in scores.items()
        for layer, row in enumerate(layers)
        for head, value in enumerate(row)
        if value or name != "copy_gain"
    }


def from_row(row: dict[str, Any], n_layer: int, n_head: int) -> dict[str, list[list[float]]]:
    """The reverse of to_row; {} where the row has no scores."""
    if "induction/0.0" not in row:
        return {}
    return {
        name: [[row.get(f"{name}/{layer}.{head}") or 0.0 for head in range(n_head)] for layer in range(n_layer)]
        for name in ("previous_token", "induction", "copy_gain")
    }


def passage_row(found: Passage) -> dict[str, Any]:
    """A passage as keys of a row in samples.jsonl.

    loss: nats of each token. top: for each token, ids and probabilities in thousandths, in turn. attention: base64 of
    a byte per weight, 255 for 1, of each layer, head, query and key up to the query, for the first attention_tokens.
    """
    n = attention_tokens(sum(len(weights) for weights in found.attention), len(found.loss))
    rows, columns = torch.tril_indices(n, n)
    weights = torch.stack(found.attention)[:, :, rows, columns]  # (L, H, n (n + 1) / 2)
    return {
        "loss": [round(x, 3) for x in found.loss.tolist()],
        "top": torch.stack((found.top_ids, (1000 * found.top_probs).round().long()), dim=-1).flatten(1).tolist(),
        "attention_tokens": n,
        "attention": base64.b64encode((255 * weights).round().byte().cpu().numpy().tobytes()).decode(),
    }


def attention_tokens(n_heads: int, n_tokens: int) -> int:
    """How many tokens of a passage have their attention kept: n_heads n (n + 1) / 2 bytes are at most the limit."""
    return min(n_tokens, 64, max(1, math.isqrt(2 * ATTENTION_BYTES // n_heads) - 1))
