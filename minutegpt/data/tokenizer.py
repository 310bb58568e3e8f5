"""Text to token ids and back: four kinds of tokenizer with one interface, saved as plain JSON.

    >>> tokenizer = char_tokenizer("hello")
    >>> tokenizer.encode("hole")
    [1, 3, 2, 0]
    >>> tokenizer.decode([1, 3, 2, 0])
    'hole'
    >>> from_json(tokenizer.to_json()).vocab_size
    4

char has one id a character, byte one a UTF-8 byte; bpe starts from the bytes and merges the most frequent pairs of
the text it is trained on (train_bpe, below); gpt2 is OpenAI's BPE. The last two have <|endoftext|> as their highest
id, which stands between documents and is never made from plain text.
"""

import heapq
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import regex

from minutegpt.data.parallel import batches, ordered_map
from minutegpt.errors import UserError

if TYPE_CHECKING:
    import tiktoken

END = "<|endoftext|>"
KINDS = ("char", "byte", "bpe", "gpt2")
# where a text may be cut before its bytes are merged. bpe: GPT-4's, by way of minbpe; gpt2: as tiktoken has it
PATTERNS = {
    "bpe": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
}
VOCAB_LIMIT = 1 << 21  # characters of Unicode and more; what claims to be larger is not a tokenizer of ours
WORD_LIMIT = 256  # bytes: the trainer cuts longer runs without a space, which would cost it their length squared
WORDS_IN_MEMORY = 2_000_000  # distinct words that the trainer counts before it forgets the rarest


class Tokenizer:
    """kind: one of KINDS; tokens: what each id stands for, characters for char and bytes else, END not among them."""

    def __init__(self, kind: str, tokens: Sequence[str] | Sequence[bytes]) -> None:
        self.kind, self.tokens = kind, tokens
        self.end_token = len(tokens) if kind in PATTERNS else None
        self.vocab_size = len(tokens) + (self.end_token is not None)
        self._bytes = [token.encode() if isinstance(token, str) else token for token in tokens]
        self._bytes += [END.encode()] * (self.end_token is not None)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text. Raises UserError for what no id stands for, and for lone surrogates."""
        return self.encode_array(text).tolist()

    def encode_array(self, text: str) -> np.ndarray:
        """encode() as an array (N,), of uint8 for byte and uint32 else."""
        raw = _utf8(text)  # tiktoken would quietly put U+FFFD for a lone surrogate
        if self.kind == "byte":
            return np.frombuffer(raw, np.uint8)
        if self.kind == "char":
            return self._encode_characters(text)
        try:
            return self.encoding.encode_to_numpy(text, disallowed_special=())
        except ValueError:  # a million spaces in a row are too many for the split pattern's engine
            half = len(text) // 2
            return np.concatenate([self.encode_array(text[:half]), self.encode_array(text[half:])])

    def encode_bytes(self, raw: bytes) -> np.ndarray:
        """Ids of any bytes, (N,), which decode_bytes() gives back; what is no UTF-8 is encoded byte by byte."""
        if self.kind == "byte":
            return np.frombuffer(raw, np.uint8)
        ids = []
        for run in regex.findall("[\udc80-\udcff]+|[^\udc80-\udcff]+", raw.decode(errors="surrogateescape")):
            if "\udc80" <= run[0] <= "\udcff" and self.kind in PATTERNS:
                single = [self.tokens.index(bytes([b])) for b in run.encode(errors="surrogateescape")]  # type: ignore
                ids.append(np.array(single, np.uint32))
            else:
                ids.append(self.encode_array(run))
        return np.concatenate([np.empty(0, np.uint32), *ids])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of these ids; bytes that are no UTF-8, such as half a character, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        ids = list(ids)
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise UserError(f"ids {min(ids)} to {max(ids)} do not fit a vocabulary of {self.vocab_size}")
        return b"".join([self._bytes[i] for i in ids])

    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes of text that each id stands for, (V,) int64; none for END."""
        sizes = np.array([len(token) for token in self._bytes], np.int64)
        if self.end_token is not None:
            sizes[self.end_token] = 0
        return sizes

    def start_ids(self) -> list[int]:
        """The ids that a text without a prompt starts from: END, else a new line, else the first id."""
        if self.end_token is not None:
            return [self.end_token]
        newline = "\n" if self.kind == "char" else b"\n"
        return [self.tokens.index(newline) if newline in self.tokens else 0]  # type: ignore[operator,arg-type]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON that from_json() reads; bytes are written as the characters U+0000 to U+00FF."""
        tokens: Any = None
        if self.kind == "char":
            tokens = "".join(self.tokens)  # type: ignore[arg-type]
        elif self.kind in PATTERNS:
            tokens = [token.decode("latin-1") for token in self.tokens]  # type: ignore[union-attr]
        return {"kind": self.kind, "vocab_size": self.vocab_size, "tokens": tokens}

    def _encode_characters(self, text: str) -> np.ndarray:
        points = np.frombuffer(text.encode("utf-32-le"), "<u4")
        ids = self._id_of[np.minimum(points, len(self._id_of) - 1)]
        missing = np.flatnonzero(ids < 0)
        if len(missing):
            places: dict[str, list[int]] = {}
            for place in missing[:10_000].tolist():
                places.setdefault(text[place], []).append(place)
            told = [f"{c!r} at {', '.join(map(str, at[:3]))}{' ...' * (len(at) > 3)}" for c, at in places.items()]
            raise UserError(
                f"the vocabulary of {self.vocab_size} characters lacks {'; '.join(told[:10])}"
                f"{f' and {len(told) - 10} more' * (len(told) > 10)} (places count characters from 0): leave them "
                "out, or train on data prepared with --tokenizer=byte or bpe, which take any text"
            )
        return ids.astype(np.uint32)

    @cached_property
    def _id_of(self) -> np.ndarray:
        """Code point -> id, -1 where there is none; one place too many, for all code points above."""
        points = [ord(c) for c in self.tokens]  # type: ignore[arg-type]
        table = np.full(max(points) + 2, -1, np.int32)
        table[points] = np.arange(len(points))
        return table

    @cached_property
    def encoding(self) -> "tiktoken.Encoding":
        """bpe and gpt2 as tiktoken has them."""
        import tiktoken

        ranks = {token: rank for rank, token in enumerate(self._bytes[: self.end_token])}
        return tiktoken.Encoding(
            self.kind, pat_str=PATTERNS[self.kind], mergeable_ranks=ranks, special_tokens={END: len(ranks)}
        )


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"character {error.start} of the text is a lone surrogate, {text[error.start]!r}: that is half a character "
            "and stands for nothing. Read the file with the encoding that it was written in"
        ) from None


# ---------------------------------------------------------------------------------------------- making one


def char_tokenizer(text: str) -> Tokenizer:
    """The characters of the text, sorted: nanoGPT's order."""
    if not text:
        raise UserError("a char vocabulary needs a text with at least one character")
    return Tokenizer("char", sorted(set(text)))


def byte_tokenizer() -> Tokenizer:
    """256 ids, any text or file at all."""
    return Tokenizer("byte", SINGLE_BYTES)


SINGLE_BYTES = [bytes([i]) for i in range(256)]


def from_json(saved: Any) -> Tokenizer:
    """The tokenizer that to_json() wrote. Raises UserError for anything else: it may come from a stranger's file."""

    def expect(condition: object, why: str) -> None:
        if not condition:
            raise UserError(f"this is no tokenizer of ours ({why}): prepare the data again, or get the file again")

    expect(isinstance(saved, dict) and {"kind", "vocab_size", "tokens"} <= saved.keys(), "its fields are others")
    kind, tokens = saved["kind"], saved["tokens"]
    expect(kind in KINDS, f"kind {str(kind)[:40]!r} is none of {', '.join(KINDS)}")
    if kind == "byte":
        expect(tokens is None, "a byte tokenizer has no list of tokens")
        tokenizer = byte_tokenizer()
    elif kind == "char":
        expect(isinstance(tokens, str) and 0 < len(tokens) < VOCAB_LIMIT, "its characters are no text")
        expect(list(tokens) == sorted(set(tokens)), "its characters are not sorted, or come twice")
        expect(not any(0xD800 <= ord(c) < 0xE000 for c in tokens), "it has lone surrogates")
        tokenizer = Tokenizer("char", tokens)
    else:
        expect(isinstance(tokens, list) and len(tokens) < VOCAB_LIMIT, "its tokens are no list")
        expect(all(isinstance(t, str) and t and max(t) <= "\xff" for t in tokens), "a token is not bytes")
        tokenizer = Tokenizer(kind, [t.encode("latin-1") for t in tokens])
        expect(len(set(tokens)) == len(tokens), "a token comes twice")
        expect(set(SINGLE_BYTES) <= set(tokenizer.tokens), "a single byte is missing")
    expect(saved["vocab_size"] == tokenizer.vocab_size, f"it has {tokenizer.vocab_size} ids and says otherwise")
    return tokenizer


def gpt2_tokenizer(folder: Path | None = None) -> Tokenizer:
    """GPT-2's 50,257 ids, from vocab.json and merges.txt (or encoder.json and vocab.bpe, the same files) in a folder.

    Without a folder they are looked for, and downloaded, where texts are: see minutegpt/data/download.py.
    """
    from minutegpt.data.download import find_gpt2

    vocab, merges = find_gpt2(folder)
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]  # stand for themselves in the files,
    others = [b for b in range(256) if b not in printable]  # and these for U+0100 and on, in this order
    byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    tokens = [bytes([b]) for b in printable + others]
    try:
        for line in merges.read_text(encoding="utf-8").split("\n"):
            if line and not line.startswith("#version"):
                tokens.append(bytes(byte_of[c] for c in line if c != " "))
        ids = json.loads(vocab.read_bytes())
        same = len(ids) == len(tokens) + 1 == 50257 and all(
            tokens[i] == bytes(byte_of[c] for c in token) for token, i in ids.items() if token != END
        )
    except (OSError, ValueError, KeyError, AttributeError, TypeError, IndexError):
        same = False
    if not same:
        raise UserError(f"{vocab} and {merges} are not GPT-2's vocabulary: delete them and type the same again")
    return Tokenizer("gpt2", tokens)


# ---------------------------------------------------------------------------------------------- training BPE


def train_bpe(texts: Iterable[str], vocab_size: int, workers: int | None = None) -> Tokenizer:
    """A BPE vocabulary of vocab_size ids, END among them; fewer where the text has no more pairs.

    texts: documents, or pieces of them, cut where no word is. Ties go to the pair of the lowest ids, so that the same
    text gives the same vocabulary on every machine.
    """
    if vocab_size < 257 or vocab_size > VOCAB_LIMIT:
        raise UserError(f"--vocab_size={vocab_size}: BPE has the 256 bytes, {END} and its merges: 257 or more")
    tokens = list(SINGLE_BYTES)
    for left, right in merge_pairs(count_words(texts, workers), vocab_size - 257):
        tokens.append(tokens[left] + tokens[right])
    return Tokenizer("bpe", tokens)


def count_words(texts: Iterable[str], workers: int | None = None) -> Counter[str]:
    """How often each pre-token occurs, counted in parallel. Of very many, the rarest are forgotten on the way."""
    counts: Counter[str] = Counter()
    least = 1
    for counted in ordered_map(_count, batches(texts, 1 << 20), workers):
        counts.update(counted)
        while len(counts) > WORDS_IN_MEMORY:
            least += 1
            counts = Counter({word: count for word, count in counts.items() if count >= least})
    return counts


def _count(texts: list[str]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(regex.findall(PATTERNS["bpe"], text))
    return counts


def merge_pairs(counts: dict[str, int], n_merges: int) -> list[tuple[int, int]]:
    """The merges, in order: the i-th makes id 256 + i of the pair of ids that was then the most frequent.

    Works on distinct words, each weighted with its count, and after a merge looks only at the words that held the
    pair, because it keeps how often and where each pair occurs. The heap may also hold what a pair once counted: what
    comes off its top is believed only if it is still so.
    """
    words: list[list[int]] = []
    weights: list[int] = []
    for text, count in counts.items():
        raw = _utf8(text)
        for start in range(0, len(raw), WORD_LIMIT):
            words.append(list(raw[start : start + WORD_LIMIT]))
            weights.append(count)
    total: dict[tuple[int, int], int] = {}  # pair -> how often it occurs
    where: dict[tuple[int, int], list[int]] = {}  # pair -> words that hold it, or once did

    def add(pair: tuple[int, int], i: int) -> None:
        if pair in total:
            total[pair] += weights[i]
            where[pair].append(i)
        else:
            total[pair], where[pair] = weights[i], [i]

    for i, word in enumerate(words):
        for pair in pairwise(word):
            add(pair, i)
    heap = [(-count, pair) for pair, count in total.items()]  # the most frequent first, then the lowest ids
    heapq.heapify(heap)
    merges: list[tuple[int, int]] = []
    while heap and len(merges) < n_merges:
        count, pair = heapq.heappop(heap)
        now = total.get(pair, 0)
        if now != -count or now == 0:
            if now:
                heapq.heappush(heap, (-now, pair))
            continue
        new, (left, right) = 256 + len(merges), pair
        merges.append(pair)
        made = set()
        for i in set(where[pair]):
            word, at = words[i], 0
            while at < len(word) - 1:
                if word[at] == left and word[at + 1] == right:
                    word[at : at + 2] = [new]
                    if at > 0:
                        total[word[at - 1], left] -= weights[i]
                        add((word[at - 1], new), i)
                        made.add((word[at - 1], new))
                    if at < len(word) - 1:
                        total[right, word[at + 1]] -= weights[i]
                        add((new, word[at + 1]), i)
                        made.add((new, word[at + 1]))
                at += 1
        del total[pair], where[pair]
        for pair in made:
            heapq.heappush(heap, (-total[pair], pair))
    return merges
