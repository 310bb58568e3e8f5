"""minutegpt/page/tokenizer.js returns the ids and the text of minutegpt/data/tokenizer.py."""

import random
import unicodedata
from functools import cache
from typing import Any

import pytest
from harness import ROOT
from javascript import node

from minutegpt.data.tokenizer import END, Tokenizer, byte_tokenizer, char_tokenizer, train_bpe
from minutegpt.errors import UserError
from minutegpt.page.live import token_text

TEXT = (ROOT / "minutegpt" / "data" / "tokenizer.py").read_text(encoding="utf-8")
TEXT += "Don't WE'LL 12345\r\n\t naïve  日本語 🙂🙂 \n\n"
NASTY = [
    "", " ", "\n", "\r\n", "\r\n\r\n  \r\n", "  \n\n  x", "a  b   c    ", "\t\t\tx", "trailing   ",
    "I'm YOU'RE he'S we'Ll they'VE o'clock 'tis '' ''' don’t rock'n'roll", "it'ſ IT'ſ",
    "1 12 123 1234 12345678901 ٣٤٥٦ ²³ Ⅷ 1.5e-3 1,000", "🙂🙂 👩‍👩‍👧‍👦 🇩🇪🇫🇷 👍🏽 ☺️",
    "e\u0301 a\u0323\u0307 \u0301 Zalgo\u0334\u0322", "日本語のテキスト。中文，標點！한국어 ไทย हिन्दी",
    "ﬁ ſ ß ẞ İ ı K Å",
    "\ufeffBOM \ufeff", "a\u0085b\u00a0c\u2003d\u2028e\u2029f\u3000g\u200bh\u180ei", "\x00\x01\x1c\x1d\x1e\x1f\x7f",
    "</script><!-- <b>&amp;", f"text {END} more{END}", "\U0010ffff\ue000\ufffe", "<<<>>>!?!?\n\n\r\r",
    "_x_ __init__ a-b",
]  # fmt: skip
ENCODE = """
output(input.map(({ tokenizer: saved, texts, ids, lone }) => {
  const tokenizer = new Tokenizer(saved);
  const attempt = (text) => { try { return tokenizer.encode(text); } catch (error) { return error.name; } };
  return {
    ids: texts.map((text) => tokenizer.encode(text)),
    texts: ids.map((some) => tokenizer.decode(some)),
    refused: lone.map(attempt),
    missing: lone.map((text) => tokenizer.missing(text).map((c) => c.codePointAt(0))),
    start: tokenizer.start(),
    names: tokenizer.bytes.map((_, id) => tokenizer.name(id)),
  };
}));
"""


@cache
def bpe() -> Tokenizer:
    return train_bpe([TEXT + " ".join(NASTY)], 700)


def every_character() -> list[str]:
    """Texts in which the characters that this Python's Unicode has are first, inner and last in a word."""
    points = [*range(1, 0x3100), *range(0xA000, 0xD800, 7), *range(0xE000, 0x20000, 5), *range(0x20000, 0x30000, 99)]
    known = [chr(i) for i in points if unicodedata.category(chr(i)) not in ("Cn", "Cs")]
    return ["".join(f"x{c}y {c}1{c} {c}\n{c}'s" for c in known[at : at + 500]) for at in range(0, len(known), 500)]


def random_texts(n: int) -> list[str]:
    letters = [*"aB's l-1.,_$<|é日🙂٣\n\r\t\u00a0\u2028’ſ\u0085\ufeff", "e\u0301", "'ll", "\r\n", "'RE"]
    draw = random.Random(1)
    return ["".join(draw.choices(letters, k=draw.randrange(40))) for _ in range(n)]


@pytest.fixture(scope="module")
def answers() -> dict[str, tuple[Tokenizer, dict[str, Any], dict[str, Any]]]:
    """One process for all. Kind -> the tokenizer, the question and the answer."""
    texts = [*NASTY, *random_texts(1000), *every_character(), "a" * 3000, " " * 3000 + "x", "ab" * 2000, TEXT]
    tokenizers = {
        "char": char_tokenizer("".join(texts)),
        "byte": byte_tokenizer(),
        "bpe": bpe(),
        "gpt2": Tokenizer("gpt2", bpe().tokens),  # its pattern, with other merges
    }
    draw = random.Random(2)
    questions = {}
    for kind, tokenizer in tokenizers.items():
        ids = [
            [draw.randrange(tokenizer.vocab_size) for _ in range(30)] for _ in range(100)
        ]  # also halves of characters
        questions[kind] = {"tokenizer": tokenizer.to_json(), "texts": texts, "ids": ids, "lone": []}
    found = node(ENCODE, list(questions.values()), "tokenizer.js")
    return {kind: (tokenizers[kind], questions[kind], answer) for kind, answer in zip(questions, found, strict=True)}


@pytest.mark.parametrize("kind", ["char", "byte", "bpe", "gpt2"])
def test_ids_and_text_are_those_of_python(answers, kind):
    tokenizer, question, answer = answers[kind]
    for text, ids in zip(question["texts"], answer["ids"], strict=True):
        assert ids == tokenizer.encode(text), text[:100]
    for ids, text in zip(question["ids"], answer["texts"], strict=True):
        assert text == tokenizer.decode(ids)
    assert answer["start"] == tokenizer.start_ids()
    assert answer["names"] == [token_text(tokenizer, i) for i in range(tokenizer.vocab_size)], "as run.html names them"


def test_what_has_no_id_is_refused_and_named():
    tokenizer = char_tokenizer("abc\n")
    saved = [{"tokenizer": t.to_json(), "texts": [], "ids": []} for t in (tokenizer, byte_tokenizer(), bpe())]
    lone = ["abc", "aXbXé", "a\ud83d", "\ude42b"]  # the last two have half a character
    char, *others = node(ENCODE, [each | {"lone": lone} for each in saved], "tokenizer.js")
    assert char["refused"] == [tokenizer.encode("abc"), "RangeError", "RangeError", "RangeError"]
    assert char["missing"] == [[], [ord("X"), ord("é")], [0xD83D], [0xDE42]]
    for kind, answer in zip((byte_tokenizer(), bpe()), others, strict=True):
        assert answer["missing"] == [[], [], [0xD83D], [0xDE42]]
        assert answer["refused"][:2] == [kind.encode(text) for text in lone[:2]]
        assert answer["refused"][2:] == ["RangeError"] * 2
        with pytest.raises(UserError):  # as in Python
            kind.encode(lone[2])
