"""What the planner has to know of a text: its length, how hard it is, and how much more of it helps.

text = describe_text(open_data("my_book", "train"), open_data("my_book", "val"))
"""

import math
from typing import NamedTuple

import numpy as np

from minutegpt.data.dataset import Split

SAMPLE = 2**18  # training tokens that are counted, in pieces from all of the text


class Text(NamedTuple):
    """tokens, val_tokens: of the splits. shortest: tokens of the shortest part of them.

    counting_loss: what counting sequences and copying reaches, in nats per token. counted: the training tokens that
    were counted for it. gain: with n of them, that loss is about n^-gain times a constant. bigram_loss: what counting
    pairs reaches. repeated: the share of 16-token sequences that occurred before.
    """

    tokens: int
    val_tokens: int
    vocab_size: int
    counted: int
    counting_loss: float
    gain: float
    bigram_loss: float
    repeated: float
    shortest: int


def describe_text(train: Split, val: Split) -> Text:
    vocab_size, n = train.meta["tokenizer"]["vocab_size"], min(SAMPLE, len(train))
    ids, unseen = sample_tokens(train, n), sample_tokens(val, SAMPLE // 4)
    loss, bigram_loss = counting_losses(ids, unseen, vocab_size)
    less, _ = counting_losses(sample_tokens(train, max(1, n // 4)), unseen, vocab_size)
    loss, less = max(1e-9, loss), max(1e-9, less)  # 0 where one token is all that there is
    gain = math.log(less / loss) / math.log(4)
    repeated = 1 - len(np.unique(sequence_keys(ids, 16))) / max(1, len(ids) - 15)
    return Text(
        len(train), len(val), vocab_size, counted=len(ids), counting_loss=loss, gain=min(0.3, max(0.0, gain)),
        bigram_loss=bigram_loss, repeated=max(0.0, repeated),
        shortest=min(n_tokens for split in (train, val) for n_tokens, _ in split.parts),
    )  # fmt: skip


def sample_tokens(split: Split, n: int) -> np.ndarray:
    """About n ids of a split, (n,) int64, in up to 64 pieces that are spread evenly over it."""
    if len(split) <= n:
        return split.tokens(0, len(split)).astype(np.int64)
    piece = -(-n // 64)
    starts = np.linspace(0, len(split) - piece, n // piece).astype(np.int64).tolist()
    return np.concatenate([split.tokens(start, start + piece) for start in starts]).astype(np.int64)


def sequence_keys(ids: np.ndarray, n: int) -> np.ndarray:
    """A number for each sequence of n ids, (N,) -> (N - n + 1,) uint64: equal sequences have equal numbers."""
    tokens = keys = ids.astype(np.uint64) + np.uint64(1)
    for length in range(2, n + 1):
        mixed = keys[:-1] ^ (keys[:-1] >> np.uint64(29))
        keys = mixed * np.uint64(0x9E3779B97F4A7C15) + tokens[length - 1 :]  # wraps around
    return keys


def counting_losses(train: np.ndarray, val: np.ndarray, vocab_size: int) -> tuple[float, float]:
    """The losses on val of a model that counts sequences and copies, and of one that counts pairs; nats per token."""
    found = ngram_probabilities(train, val, vocab_size)
    losses = [float(-np.log(p).mean()) for p in found]
    return min(copying_loss(val, p) for p in found), losses[min(1, len(losses) - 1)]


def ngram_probabilities(train: np.ndarray, val: np.ndarray, vocab_size: int, order: int = 5) -> list[np.ndarray]:
    """For each length n up to order, what counting the sequences of n tokens in train gives each token of val, (M,).

    p(w after h) = (n_hw + k_h p(w after h without its first token)) / (n_h + k_h), where h was followed n_h times by
    k_h different tokens (Witten and Bell, 1991).
    """
    counts = np.bincount(train, minlength=vocab_size)
    kinds = np.count_nonzero(counts)
    found = [((counts + kinds / vocab_size) / (len(train) + kinds))[val]]
    for n in range(2, min(order, len(train) - 1, len(val) - 1) + 1):
        keys, first, n_keys = np.unique(sequence_keys(train, n), return_index=True, return_counts=True)
        contexts, asked = sequence_keys(train, n - 1)[:-1], sequence_keys(val, n - 1)[:-1]
        n_hw = look_up(keys, n_keys, sequence_keys(val, n))
        n_h = look_up(*np.unique(contexts, return_counts=True), asked)
        k_h = look_up(*np.unique(contexts[first], return_counts=True), asked)
        lower = found[-1][1:]
        found.append(np.where(n_h > 0, (n_hw + k_h * lower) / np.maximum(1, n_h + k_h), lower))
    return found


def copying_loss(val: np.ndarray, p: np.ndarray, window: int = 256) -> float:
    """The loss where p (M,), for the last M tokens of val, is mixed with a copy of what came before.

    The last 2, 3, 4, 6 or 8 tokens, the more the better, are searched in the window, and what followed them there is
    the guess. Attention learns the same.
    """
    matched, guess = np.zeros(len(val), np.int64), np.zeros(len(val), np.int64)
    for n in (2, 3, 4, 6, 8):
        keys = sequence_keys(val, n)[:-1]  # of the tokens before position n, n + 1, ...
        order = np.argsort(keys, kind="stable")
        at, before = order[1:] + n, order[:-1] + n
        near = (keys[order[1:]] == keys[order[:-1]]) & (at - before <= window)
        matched[at[near]], guess[at[near]] = n, val[before[near]]
    p, matched, right = p.copy(), matched[-len(p) :], (guess == val)[-len(p) :]
    for n in np.unique(matched[matched > 0]).tolist():
        here = matched == n
        mixed = [share * right[here] + (1 - share) * p[here] for share in np.linspace(0, 0.9, 10)]
        p[here] = max(mixed, key=lambda each: float(np.log(each).sum()))
    return float(-np.log(p).mean())


def look_up(keys: np.ndarray, counts: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """The count of each key asked for; 0 where it is not among the sorted keys."""
    at = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
    return np.where(keys[at] == asked, counts[at], 0)
