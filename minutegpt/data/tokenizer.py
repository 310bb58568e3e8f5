"""Text to token ids and back: four kinds of tokenizer with one interface, saved as plain JSON.

    >>> tokenizer = char_tokenizer("hello")
    >>> tokenizer.encode("hole")
    [1, 3, 2, 0]
    >>> tokenizer.decode([1, 3, 2, 0])
    'hole'
    >>> from_json(tokenizer.to_json()).vocab_size
    4

char has one id per character and byte one per UTF-8 byte. bpe starts from the bytes and merges the most frequent
pairs of its training text (train_bpe, below). gpt2 is OpenAI's BPE. The last two have <|endoftext|> as their highest
id: it ends each document, and no text is encoded to it.
"""

import heapq
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
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
# how a text is split into words before the bytes of each word are merged. bpe: GPT-4's pattern, as minbpe writes it;
# gpt2: tiktoken's
PATTERNS = {
    "bpe": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
}
# where a text can be cut so that its pieces are split into the same words as the whole: no word of either pattern
# extends across these places, and none looks past them. (?r): the search begins at the end
CUT = regex.compile(r"(?r)(?<=[\p{L}\p{N}])(?=[\s\p{P}])|(?<=\S)(?=[ \t])|(?<=\S\n)(?=\S)")
PIECE = 1 << 20  # characters: longer texts are cut
CUT_SEARCH = 1 << 12  # characters before the end of a piece where a place to cut is looked for
VOCAB_LIMIT = 1 << 21  # more ids than Unicode has characters; a larger number is an error
WORD_LIMIT = 256  # bytes: the trainer cuts longer words, because a word costs the square of its length
WORDS_IN_MEMORY = 2_000_000  # distinct words that the trainer counts before it drops the rarest


class Tokenizer:
    """kind: one of KINDS. tokens: the characters (char) or bytes (other kinds) of each id, without END."""

    def __init__(self, kind: str, tokens: Sequence[str] | Sequence[bytes]) -> None:
        self.kind, self.tokens = kind, tokens
        self.end_token = len(tokens) if kind in PATTERNS else None
        self.vocab_size = len(tokens) + (self.end_token is not None)
        self._bytes = [token.encode() if isinstance(token, str) else token for token in tokens]
        self._bytes += [END.encode()] * (self.end_token is not None)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text. Raises UserError for a character without an id, and for lone surrogates."""
        return self.encode_array(text).tolist()

    def encode_array(self, text: str) -> np.ndarray:
        """encode() as an array (N,), uint8 for byte and uint32 for the other kinds."""
        raw = _utf8(text)  # tiktoken would silently replace a lone surrogate by U+FFFD
        if self.kind == "byte":
            return np.frombuffer(raw, np.uint8)
        if self.kind == "char":
            return self._encode_characters(text)
        ids = [self._encode_piece(piece) for piece in cut_pieces([text])]
        return ids[0] if len(ids) == 1 else np.concatenate([np.empty(0, np.uint32), *ids])

    def _encode_piece(self, text: str) -> np.ndarray:
        try:
            return self.encoding.encode_to_numpy(text, disallowed_special=())
        except ValueError:  # tiktoken's regex engine fails on a million spaces in a row
            cut = safe_cut(text, len(text) // 2)
            return np.concatenate([self._encode_piece(text[:cut]), self._encode_piece(text[cut:])])

    def encode_bytes(self, raw: bytes) -> np.ndarray:
        """Ids of any bytes, (N,); decode_bytes() is the inverse. What is not UTF-8 is encoded byte by byte."""
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
        """The text of these ids. Bytes that are not UTF-8, such as half a character, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        ids = list(ids)
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise UserError(f"ids {min(ids)} to {max(ids)} do not fit a vocabulary of {self.vocab_size}")
        return b"".join([self._bytes[i] for i in ids])

    def token_bytes(self) -> np.ndarray:
        """The number of UTF-8 bytes of each id's text, (V,) int64; 0 for END."""
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
        """Plain JSON, which from_json() reads. Bytes are written as the characters U+0000 to U+00FF."""
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
            positions: dict[str, list[int]] = {}
            for position in missing[:10_000].tolist():
                positions.setdefault(text[position], []).append(position)
            named = [f"{c!r} at {', '.join(map(str, at[:3]))}{' ...' * (len(at) > 3)}" for c, at in positions.items()]
            others = f" and {len(named) - 10} more" if len(named) > 10 else ""
            raise UserError(
                f"the vocabulary of {self.vocab_size} characters lacks {'; '.join(named[:10])}{others} (positions "
                "count characters from 0). Leave them out, or train on data prepared with --tokenizer=byte or bpe, "
                "which encode any text"
            )
        return ids.astype(np.uint32)

    @cached_property
    def _id_of(self) -> np.ndarray:
        """Code point -> id, -1 where there is none. The last entry is for all higher code points."""
        points = [ord(c) for c in self.tokens]  # type: ignore[arg-type]
        table = np.full(max(points) + 2, -1, np.int32)
        table[points] = np.arange(len(points))
        return table

    @cached_property
    def encoding(self) -> "tiktoken.Encoding":
        """The tiktoken encoding of a bpe or gpt2 vocabulary."""
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
            f"character {error.start} of the text is a lone surrogate, {text[error.start]!r}, which is half a "
            "character. Read the file with the encoding that it was written in"
        ) from None


def safe_cut(text: str, end: int) -> int:
    """The last position up to `end` where CUT allows to cut the text; `end` itself where none is near."""
    found = CUT.search(text, max(1, end - CUT_SEARCH), min(end + 1, len(text)))
    return found.start() if found else end


def cut_pieces(texts: Iterable[str]) -> Iterator[str]:
    """One text, given in parts of any size, in pieces of at most PIECE characters, in linear time.

    The pieces depend on the text alone, not on the parts. encode_array() cuts by the same rule, so that the ids of
    the pieces are the ids of the whole. Where CUT finds no place near the end of a piece, as in a genome on one line,
    the piece has PIECE characters.
    """
    rest = ""
    for text in texts:
        rest += text
        start = 0
        while len(rest) - start > PIECE:
            window = rest[start : start + PIECE + 1]  # one more: CUT looks at the character after the cut
            cut = safe_cut(window, PIECE)
            yield window[:cut]
            start += cut
        rest = rest[start:]
    if rest:
        yield rest


# ---------------------------------------------------------------------------------------------- making one


def char_tokenizer(text: str) -> Tokenizer:
    """The characters of the text, sorted: nanoGPT's order."""
    if not text:
        raise UserError("a char vocabulary needs a text with at least one character")
    return Tokenizer("char", sorted(set(text)))


def byte_tokenizer() -> Tokenizer:
    """256 ids, which encode any text and any file."""
    return Tokenizer("byte", SINGLE_BYTES)


SINGLE_BYTES = [bytes([i]) for i in range(256)]


def from_json(saved: Any) -> Tokenizer:
    """The tokenizer that to_json() wrote. Raises UserError for anything else: the file may be a stranger's."""

    def expect(condition: object, why: str) -> None:
        if not condition:
            raise UserError(f"this is no tokenizer of ours ({why}). Prepare the data again, or get the file again")

    expect(isinstance(saved, dict) and {"kind", "vocab_size", "tokens"} <= saved.keys(), "it has other fields")
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
    expect(saved["vocab_size"] == tokenizer.vocab_size, f"it has {tokenizer.vocab_size} ids and claims another number")
    return tokenizer


def gpt2_tokenizer(folder: Path | None = None) -> Tokenizer:
    """GPT-2's 50,257 ids, from vocab.json and merges.txt in a folder (or encoder.json and vocab.bpe, the same files).

    Without a folder, minutegpt/data/download.py finds or downloads them.
    """
    from minutegpt.data.download import find_gpt2

    vocab, merges = find_gpt2(folder)
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]  # written as themselves in the files
    others = [b for b in range(256) if b not in printable]  # written as U+0100, U+0101, ...
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
        raise UserError(f"{vocab} and {merges} are not GPT-2's vocabulary. Delete them and type the same command again")
    return Tokenizer("gpt2", tokens)


# ---------------------------------------------------------------------------------------------- training BPE


def train_bpe(texts: Iterable[str], vocab_size: int, workers: int | None = None) -> Tokenizer:
    """A BPE vocabulary of vocab_size ids, including END; fewer where the text has no more pairs.

    texts: documents, or pieces of them that cut no word. Of equally frequent pairs, the one with the lowest ids is
    merged first, so that a text has the same vocabulary on every machine. Algorithm: Sennrich et al. 2016,
    arXiv:1508.07909.
    """
    if vocab_size < 257 or vocab_size > VOCAB_LIMIT:
        raise UserError(
            f"--vocab_size={vocab_size} is out of bounds. BPE has the 256 bytes, {END} and its merges: take 257 or more"
        )
    tokens = list(SINGLE_BYTES)
    for left, right in merge_pairs(count_words(texts, workers), vocab_size - 257):
        tokens.append(tokens[left] + tokens[right])
    return Tokenizer("bpe", tokens)


def count_words(texts: Iterable[str], workers: int | None = None) -> Counter[str]:
    """How often each word occurs, counted in parallel. Above WORDS_IN_MEMORY, the rarest are dropped on the way."""
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
    """The merges, in order. The i-th one replaces the most frequent pair of ids by the new id 256 + i.

    counts: word -> how often it occurs. The same result as this loop, which counts all pairs again for each merge:

        words = [(list(word.encode()), n) for word, n in counts.items()]
        for new in range(256, 256 + n_merges):
            pairs = Counter(pair for ids, n in words for pair in pairwise(ids) for _ in range(n))
            merges.append(min(pairs, key=lambda pair: (-pairs[pair], pair)))
            words = [(replace(ids, merges[-1], new), n) for ids, n in words]  # each pair in ids by new

    This function is fast because it remembers how often each pair occurs, and in which words. After a merge, it looks
    only at the words that held the pair. The heap may hold outdated counts: the top is compared with `total` first.
    """
    words: list[list[int]] = []
    weights: list[int] = []
    for text, count in counts.items():
        raw = _utf8(text)
        for start in range(0, len(raw), WORD_LIMIT):
            words.append(list(raw[start : start + WORD_LIMIT]))
            weights.append(count)
    total: dict[tuple[int, int], int] = {}  # pair -> how often it occurs
    words_with: dict[tuple[int, int], list[int]] = {}  # pair -> words that hold it, or did

    def add(pair: tuple[int, int], i: int) -> None:
        if pair in total:
            total[pair] += weights[i]
            words_with[pair].append(i)
        else:
            total[pair], words_with[pair] = weights[i], [i]

    for i, word in enumerate(words):
        for pair in pairwise(word):
            add(pair, i)
    heap = [(-count, pair) for pair, count in total.items()]  # the most frequent first, then the lowest ids
    heapq.heapify(heap)
    merges: list[tuple[int, int]] = []
    while heap and len(merges) < n_merges:
        count, pair = heapq.heappop(heap)
        current = total.get(pair, 0)
        if current != -count or current == 0:
            if current:
                heapq.heappush(heap, (-current, pair))
            continue
        new, (left, right) = 256 + len(merges), pair
        merges.append(pair)
        new_pairs = set()
        for i in set(words_with[pair]):
            word, at = words[i], 0
            while at < len(word) - 1:
                if word[at] == left and word[at + 1] == right:
                    word[at : at + 2] = [new]
                    if at > 0:
                        total[word[at - 1], left] -= weights[i]
                        add((word[at - 1], new), i)
                        new_pairs.add((word[at - 1], new))
                    if at < len(word) - 1:
                        total[right, word[at + 1]] -= weights[i]
                        add((new, word[at + 1]), i)
                        new_pairs.add((new, word[at + 1]))
                at += 1
        del total[pair], words_with[pair]
        for pair in new_pairs:
            heapq.heappush(heap, (-total[pair], pair))
    return merges
