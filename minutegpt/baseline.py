"""What a text alone says about a loss: uniform guessing, counting tokens, counting pairs; and whether it repeats.

baselines(train, val)  # {"uniform": 4.174, "unigram": 3.32, "bigram": 2.47, "repeated": 0.0}
"""

import math
from collections.abc import Callable

import numpy as np

from minutegpt.data.dataset import Split

TRAIN_TOKENS, VAL_TOKENS = 1_000_000, 100_000  # at most, of larger splits: 0.3 seconds
MAX_VOCABULARY = 4096  # above it this few tokens hold too few of the pairs
SPAN = 64  # tokens: that many in the same order are no chance


def baselines(train: Split, val: Split) -> dict[str, float]:
    """Losses on the validation split, in nats per token, and the share of its spans that the training split has too.

    unigram, bigram: of a model that counts tokens, or pairs, in the training split. With a large vocabulary bigram is
    the unigram's. Large splits are read in part.
    """
    V = int(val.meta["tokenizer"]["vocab_size"])
    ids, targets = sample(train, TRAIN_TOKENS), sample(val, VAL_TOKENS)
    counts = np.bincount(ids, minlength=V) + 1  # (V,)
    unigram = float(-np.log(counts[targets] / counts.sum()).mean())
    bigram = unigram
    if V <= MAX_VOCABULARY and len(targets) > 1:
        bigram = pair_counts(ids, V)[0](targets) / (len(targets) - 1)
    return {"uniform": math.log(V), "unigram": unigram, "bigram": bigram, "repeated": repeated_share(ids, targets)}


def sample(data: Split, n_tokens: int) -> np.ndarray:
    """About n_tokens ids, (n,) int64: the whole split, or eight pieces at equal distances."""
    N, piece = len(data), n_tokens // 8
    if n_tokens >= N:
        return data.tokens(0, N).astype(np.int64)
    starts = [i * (N - piece) // 7 for i in range(8)]
    return np.concatenate([data.tokens(start, start + piece) for start in starts]).astype(np.int64)


def pair_counts(ids: np.ndarray, vocab_size: int) -> tuple[Callable[[np.ndarray], float], int]:
    """Counts the pairs of tokens in ids (n,). Returns nats(ids), the summed loss of that model, and the number of
    distinct pairs.

    p(j after i) = (n_ij + k_i p(j)) / (n_i + k_i), where i was followed n_i times by k_i different tokens.
    p(j) = (n_j + 1) / (n + V). This is Witten-Bell smoothing (1991): the more different followers i had, the more
    probability goes to unseen ones. Memory grows with the pairs that occur, not with V * V.
    """
    V = vocab_size
    pairs, counts = np.unique(ids[:-1] * V + ids[1:], return_counts=True)  # (P,) each; a pair is one number, i * V + j
    followed = np.bincount(ids[:-1], minlength=V)  # (V,) n_i
    kinds = np.maximum(np.bincount(pairs // V, minlength=V), 1)  # (V,) k_i
    single = (np.bincount(ids, minlength=V) + 1) / (len(ids) + V)  # (V,) p(j)
    pairs, counts = np.append(pairs, V * V), np.append(counts, 0)  # so that a search always ends at an entry

    def nats(ids: np.ndarray) -> float:
        i, j = ids[:-1], ids[1:]
        at = np.searchsorted(pairs, i * V + j)
        n = np.where(pairs[at] == i * V + j, counts[at], 0)
        return -float(np.log((n + kinds[i] * single[j]) / (followed[i] + kinds[i])).sum())

    return nats, len(pairs) - 1


def repeated_share(ids: np.ndarray, targets: np.ndarray) -> float:
    """The share of the spans of SPAN tokens in targets, 1000 of them at most, that occur in ids as well."""
    if min(len(ids), len(targets)) < SPAN:
        return 0.0
    starts = np.arange(0, len(targets) - SPAN + 1, max(1, len(targets) // 1000))
    wanted = np.unique(_span_hashes(targets)[starts])
    hashes = _span_hashes(ids)
    at = np.minimum(np.searchsorted(wanted, hashes), len(wanted) - 1)
    found = np.unique(hashes[wanted[at] == hashes])
    return float(np.isin(_span_hashes(targets)[starts], found).mean())


def _span_hashes(ids: np.ndarray) -> np.ndarray:
    """A hash of each span of SPAN tokens: (n,) -> (n - SPAN + 1,) uint64. Doubles the span, from one token on."""
    hashes, factor, length = ids.astype(np.uint64) + np.uint64(1), 0x9E3779B97F4A7C15, 1
    while length < SPAN:
        hashes = hashes[:-length] * np.uint64(factor) + hashes[length:]  # modulo 2**64
        factor, length = factor * factor % 2**64, 2 * length
    return hashes
