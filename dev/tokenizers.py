"""How fast the BPE trainer is, beside Hugging Face's and minbpe's, and the encoder, beside tiktoken's own batches.

python -m dev.tokenizers DATASET bpe,encode [MINBPE]  # one JSON object; bench.py asks for it
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


def train_seconds(text: str, vocab_size: int = 4096, minbpe: str | Path = "") -> dict[str, float]:
    """Seconds to train a BPE vocabulary on a text: ours, and the others' where they are installed.

    minbpe: a checkout of github.com/karpathy/minbpe; its seconds are those of its first ten merges, times the number
    of all: the whole takes many minutes. (Later ones are somewhat cheaper, as the text gets shorter.)
    """
    seconds = {"ours": best_of(3, lambda: train_bpe([text], vocab_size))}
    try:
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

        def theirs() -> None:
            tokenizer = Tokenizer(models.BPE())
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
                pre_tokenizers.Split(Regex(PATTERNS["bpe"]), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ])  # fmt: skip
            alphabet = pre_tokenizers.ByteLevel.alphabet()
            trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
            tokenizer.train_from_iterator([text], trainer)

        seconds["tokenizers"] = best_of(3, theirs)
    except ImportError:
        pass
    if minbpe:
        sys.path.insert(0, str(minbpe))
        from minbpe import RegexTokenizer  # type: ignore[import-not-found]

        first = best_of(1, lambda: RegexTokenizer().train(text, 256 + 1))  # the split of the text is in it too
        eleven = best_of(1, lambda: RegexTokenizer().train(text, 256 + 11))
        seconds["minbpe"] = first + (eleven - first) / 10 * (vocab_size - 257)
    return seconds


def encode_seconds(documents: list[str], tokenizer: Tokenizer) -> dict[str, float]:
    """Seconds to encode documents as the prepare scripts do, start of the processes included, and as tiktoken does.

    documents: 200 MB or more, else it is the start that is measured. Both use all CPUs.
    """

    def ours() -> None:
        pieces = batches((Piece("train", text, last=True) for text in documents), BATCH, lambda piece: len(piece.text))
        for _ in ordered_map(encode_batch, ((batch, None) for batch in pieces), None, load_tokenizer, (saved,)):
            pass

    def theirs() -> None:
        for batch in batches(documents, BATCH):  # lists of numbers: all of them would take 40 bytes a token
            tokenizer.encoding.encode_ordinary_batch(batch, num_threads=cpu_count())

    saved = tokenizer.to_json()
    rounds = [(best_of(1, ours), best_of(1, theirs)) for _ in range(3)]  # in turn: a busy moment must not hit one alone
    return {"ours": min(our for our, _ in rounds), "tiktoken": min(their for _, their in rounds)}


if __name__ == "__main__":  # the worker processes import this file, and must not start it again
    dataset, parts, minbpe = [*sys.argv[1:], ""][:3]
    data = open_data(dataset, "train")
    text = from_json(data.meta["tokenizer"]).decode(data.tokens(0, len(data)))
    found = {}
    if "bpe" in parts:
        found["bpe_seconds"] = train_seconds(text, 4096, minbpe)
    if "encode" in parts:
        found["encode_seconds"] = encode_seconds([text] * max(1, 250_000_000 // len(text)), train_bpe([text], 4096))
    print(json.dumps(found))
