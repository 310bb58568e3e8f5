"""Seconds of BPE training next to Hugging Face's and minbpe's, and of encoding next to tiktoken's batches.

dev/compare.py runs it as a separate process: python -m dev.time_tokenizers DATASET bpe,encode [MINBPE]
It prints one JSON object.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minutegpt.data.dataset import open_data
from minutegpt.data.parallel import batches, cpu_count, ordered_map
from minutegpt.data.pipeline import encode_batch, load_tokenizer
from minutegpt.data.sources import BATCH, Piece
from minutegpt.data.tokenizer import PATTERNS, Tokenizer, from_json, train_bpe


def best_of(n: int, function: Callable[[], Any]) -> float:
    """Seconds of the fastest of n calls."""
    times = []
    for _ in range(n):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def train_seconds(
    texts: list[str], vocab_size: int = 4096, minbpe: str | Path = "", rounds: int = 3
) -> dict[str, float]:
    """Seconds to train a BPE vocabulary on texts: ours, and those of the libraries that are installed.

    minbpe: a checkout of github.com/karpathy/minbpe. Training it takes many minutes, so its seconds are extrapolated
    from its first ten merges. (Later merges are somewhat cheaper, because the text gets shorter.)
    """
    seconds = {"ours": best_of(rounds, lambda: train_bpe(texts, vocab_size))}
    try:
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

        def baseline() -> None:
            tokenizer = Tokenizer(models.BPE())
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
                pre_tokenizers.Split(Regex(PATTERNS["bpe"]), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ])  # fmt: skip
            alphabet = pre_tokenizers.ByteLevel.alphabet()
            trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
            tokenizer.train_from_iterator(texts, trainer)

        seconds["tokenizers"] = best_of(rounds, baseline)
    except ImportError:
        pass
    if minbpe:
        sys.path.insert(0, str(minbpe))
        from minbpe import RegexTokenizer  # type: ignore[import-not-found]

        text = "".join(texts)
        first = best_of(1, lambda: RegexTokenizer().train(text, 256 + 1))  # includes splitting the text
        eleven = best_of(1, lambda: RegexTokenizer().train(text, 256 + 11))
        seconds["minbpe"] = first + (eleven - first) / 10 * (vocab_size - 257)
    return seconds


def encode_seconds(documents: list[str], tokenizer: Tokenizer, rounds: int = 3) -> dict[str, float]:
    """Seconds to encode documents as the prepare scripts do, including the start of processes, and as tiktoken does.

    documents: 200 MB or more, or the start dominates. Both use all CPUs.
    """

    def ours() -> None:
        pieces = batches((Piece("train", text, last=True) for text in documents), BATCH, lambda piece: len(piece.text))
        for _ in ordered_map(encode_batch, ((batch, None) for batch in pieces), None, load_tokenizer, (saved,)):
            pass

    def baseline() -> None:
        for batch in batches(documents, BATCH):  # lists of all numbers would take 40 bytes per token
            tokenizer.encoding.encode_ordinary_batch(batch, num_threads=cpu_count())

    saved = tokenizer.to_json()
    times = [(best_of(1, ours), best_of(1, baseline)) for _ in range(rounds)]  # alternate
    return {"ours": min(seconds for seconds, _ in times), "tiktoken": min(seconds for _, seconds in times)}


if __name__ == "__main__":  # worker processes import this file, and must not run it
    dataset, parts, minbpe = [*sys.argv[1:], ""][:3]
    data = open_data(dataset, "train")
    text = from_json(data.meta["tokenizer"]).decode(data.tokens(0, len(data)))
    result = {}
    if "bpe" in parts.split(","):
        result["bpe_seconds"] = train_seconds([text], 4096, minbpe)
    if "encode" in parts.split(","):
        result["encode_seconds"] = encode_seconds([text] * max(1, 250_000_000 // len(text)), train_bpe([text], 4096))
    print(json.dumps(result))
