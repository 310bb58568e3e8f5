"""Tokenizers: exact round trips, a BPE trainer that does what its slow definition does, and saved files of any kind."""

import json
import random
import re
import textwrap
from collections import Counter
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minutegpt.data import tokenizer as tokenizers
from minutegpt.data.tokenizer import (
    END,
    PATTERNS,
    byte_tokenizer,
    char_tokenizer,
    count_words,
    cut_pieces,
    from_json,
    gpt2_tokenizer,
    merge_pairs,
    train_bpe,
)
from minutegpt.errors import ROOT, UserError

# a text of every kind of character that the split pattern separates
TEXT = (ROOT / "minutegpt" / "data" / "tokenizer.py").read_text(encoding="utf-8")
TEXT += "Don't WE'LL 12345\r\n\t naïve  日本語 🙂🙂 \n\n"
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@cache
def bpe():
    return train_bpe([TEXT], 500)


@given(st.binary())
def test_any_bytes_come_back(raw):
    for tokenizer in (byte_tokenizer(), bpe()):
        ids = tokenizer.encode_bytes(raw)
        assert tokenizer.decode_bytes(ids.tolist()) == raw
        assert tokenizer.token_bytes()[ids].sum() == len(raw)


@given(ANY_TEXT)
def test_any_text_comes_back(text):
    for tokenizer in (byte_tokenizer(), bpe(), char_tokenizer(text + "\n")):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert bpe().encode_bytes(text.encode()).tolist() == bpe().encode(text)


@pytest.mark.parametrize("run", ["a", " ", "\n", "é", "1", "a \n", "!", "\t "])
def test_long_runs_are_no_trap(run):
    text = run * (2_000_000 if run == " " else 200_000) + "x"  # so many spaces stop tiktoken itself
    assert bpe().decode(bpe().encode(text)) == text


@given(st.text(), st.characters(categories=["Cs"]), st.text())
def test_half_a_character_is_an_error(before, half, after):
    for tokenizer in (byte_tokenizer(), bpe(), char_tokenizer("abc")):
        with pytest.raises(UserError, match="lone surrogate"):
            tokenizer.encode(before + half + after)


def test_char_names_what_it_lacks_and_where():
    with pytest.raises(UserError, match=r"lacks 'é' at 1, 5; '🙂' at 2 .*--tokenizer=byte"):
        char_tokenizer("hello").encode("hé🙂lhé")
    with pytest.raises(UserError, match=r"lacks 'x' at 0, 1, 2 \.\.\."):
        char_tokenizer("hello").encode("xxxxxx")


def test_end_token_is_never_made_from_text():
    assert bpe().end_token == bpe().vocab_size - 1 == 499
    assert bpe().end_token not in bpe().encode(f"a{END}b{END}")
    assert bpe().decode(bpe().encode(END)) == END
    assert bpe().token_bytes()[bpe().end_token] == 0
    assert byte_tokenizer().end_token is char_tokenizer("a").end_token is None


# ---------------------------------------------------------------------------------------------- cutting

# characters that the patterns treat differently: letters, digits, marks, signs, white space, contractions
TRICKY = st.lists(
    st.sampled_from([*"aB's l-1.,_$<|é日🙂٣\n\r\t\u00a0\u2028’", "e\u0301", "'ll", "\r\n"]), max_size=40
).map("".join)


@cache
def encodings():
    return [tokenizers.Tokenizer(kind, bpe().tokens).encoding for kind in PATTERNS]


@settings(max_examples=300)
@given(TRICKY)
def test_a_text_may_be_cut_wherever_CUT_says(text):
    for match in tokenizers.CUT.finditer(text):
        before, after = text[: match.start()], text[match.start() :]
        for pattern in PATTERNS.values():
            whole, first, second = (tokenizers.regex.findall(pattern, part) for part in (text, before, after))
            assert first + second == whole
        for encoding in encodings():
            assert encoding.encode_ordinary(before) + encoding.encode_ordinary(after) == encoding.encode_ordinary(text)


@given(TRICKY, st.integers(1, 30), st.integers(1, 40))
def test_pieces_have_the_ids_of_the_whole_text(text, piece, part):
    """However the text comes in parts, and where it cannot be cut too: the encoder cuts at the same places."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizers, "PIECE", piece)
        pieces = list(cut_pieces([text]))
        assert "".join(pieces) == text and all(0 < len(p) <= piece for p in pieces)
        assert list(cut_pieces(text[at : at + part] for at in range(0, len(text), part))) == pieces
        assert [i for p in pieces for i in bpe().encode(p)] == bpe().encode(text)


@pytest.mark.parametrize("line", ["Some words, 12 of them.\n", "one\r\ntwo\r\n", "a\n\nb\n\n", "word ", "日本、"])
def test_a_text_with_places_to_cut_has_the_ids_that_tiktoken_gives_the_whole(line, monkeypatch):
    text = line * 300
    monkeypatch.setattr(tokenizers, "PIECE", 100)
    for encoding, kind in zip(encodings(), PATTERNS, strict=True):
        assert tokenizers.Tokenizer(kind, bpe().tokens).encode(text) == encoding.encode_ordinary(text)


@pytest.mark.parametrize("ids", [[-1], [500], [0, 10**9]])
def test_ids_outside_the_vocabulary(ids):
    with pytest.raises(UserError, match="vocabulary of 500"):
        bpe().decode(ids)


# ---------------------------------------------------------------------------------------------- training


def slow_merges(words, n_merges):
    """The definition, in the slowest way: count all pairs, take the most frequent, replace it, count again."""
    words = {tuple(word.encode()): count for word, count in words.items()}
    merges = []
    while len(merges) < n_merges:
        pairs = Counter()
        for word, count in words.items():
            for pair in pairwise(word):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        new, merged = 256 + len(merges), {}
        for word, count in words.items():
            out, at = [], 0
            while at < len(word):
                here = word[at : at + 2] == best
                out.append(new if here else word[at])
                at += 1 + here
            merged[tuple(out)] = count
        words = merged
        merges.append(best)
    return merges


@settings(deadline=None)
@given(st.dictionaries(st.text("ab", min_size=1, max_size=12), st.integers(1, 5), max_size=12))
def test_merges_equal_slow_merges_with_long_runs_and_ties(words):
    assert merge_pairs(words, 30) == slow_merges(words, 30)


def test_merges_equal_slow_merges_on_text():
    words = count_words([TEXT])
    assert merge_pairs(words, 80) == slow_merges(words, 80)


def test_merges_equal_the_loop_in_the_docstring():
    """The loop is run as it is written there; `replace` is the one function that it leaves out."""

    def replace(ids, pair, new):
        out, at = [], 0
        while at < len(ids):
            here = tuple(ids[at : at + 2]) == pair
            out.append(new if here else ids[at])
            at += 1 + here
        return out

    loop = textwrap.dedent(re.search(r"\n(        words = .*?)\n\n", merge_pairs.__doc__, re.S)[1])
    counts = count_words([TEXT[:3000] + "aaaaa aaaa bbb abab"])
    names = {
        "counts": counts,
        "n_merges": 60,
        "merges": [],
        "Counter": Counter,
        "pairwise": pairwise,
        "replace": replace,
    }
    exec(loop, names)
    assert names["merges"] == merge_pairs(counts, 60) and len(names["merges"]) == 60


def test_vocabulary_does_not_depend_on_order_or_processes():
    lines = TEXT.splitlines(keepends=True)
    shuffled = random.Random(0).sample(lines, len(lines))
    once = train_bpe(lines, 400).to_json()
    assert train_bpe(shuffled, 400).to_json() == once


@pytest.mark.slow
def test_vocabulary_does_not_depend_on_processes():
    text = [TEXT] * 300  # several batches, so that there is something to share out
    assert train_bpe(text, 400, workers=2).to_json() == train_bpe(text, 400, workers=1).to_json()


def test_compresses_as_hugging_face_does():
    """Ties fall differently there, so the vocabularies differ in a few merges and the lengths by next to nothing."""
    hf = pytest.importorskip("tokenizers")
    from tokenizers import models, pre_tokenizers, trainers

    theirs = hf.Tokenizer(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(hf.Regex(PATTERNS["bpe"]), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=499, initial_alphabet=alphabet, show_progress=False)
    theirs.train_from_iterator([TEXT], trainer)
    assert len(bpe().encode(TEXT)) == pytest.approx(len(theirs.encode(TEXT).ids), rel=0.005)


def test_encoding_applies_the_merges_in_order():
    """tiktoken's bytes-up merging from our ranks equals applying the learned merges to each word."""
    words = count_words([TEXT])
    merges = merge_pairs(words, 500 - 257)
    for word in random.Random(1).sample(sorted(words), 200):
        ids = list(word.encode())
        for new, pair in enumerate(merges, 256):
            out, at = [], 0
            while at < len(ids):
                here = tuple(ids[at : at + 2]) == pair
                out.append(new if here else ids[at])
                at += 1 + here
            ids = out
        assert bpe().encode(word) == ids


def test_small_text_gives_a_small_vocabulary():
    assert train_bpe(["ab ab"], 300).vocab_size == 257 + 2  # ab, and with the space before
    assert train_bpe([""], 300).vocab_size == 257


@pytest.mark.parametrize("size", [-1, 0, 256, 1 << 30])
def test_impossible_vocabulary_size(size):
    with pytest.raises(UserError, match="vocab_size"):
        train_bpe(["text"], size)


def test_rare_words_are_forgotten_when_there_are_too_many(monkeypatch):
    monkeypatch.setattr(tokenizers, "WORDS_IN_MEMORY", 100)
    words = count_words(["common " * 50, " ".join(f"w{i}x" for i in range(1000)), "common " * 50])
    assert len(words) <= 100 and words["common"] + words[" common"] == 100


# ---------------------------------------------------------------------------------------------- saved


@pytest.mark.parametrize("make", [byte_tokenizer, bpe, lambda: char_tokenizer("héllo\n🙂")])
def test_saved_and_loaded_is_the_same(make):
    tokenizer = make()
    loaded = from_json(json.loads(json.dumps(tokenizer.to_json())))
    text = "héllo\n" if tokenizer.kind == "char" else "hello\n"
    assert loaded.encode(text) == tokenizer.encode(text) and loaded.to_json() == tokenizer.to_json()


def hostile():
    good, char = bpe().to_json(), char_tokenizer("abc").to_json()
    yield from (None, 3, [], "char", {}, {"kind": "char"})
    yield {**good, "kind": "os.system"}
    yield {**good, "kind": ["bpe"]}
    yield {**good, "vocab_size": 10**12}
    yield {**good, "tokens": None}
    yield {**good, "tokens": "abc"}
    yield {**good, "tokens": good["tokens"][1:], "vocab_size": 499}  # a byte is missing
    yield {**good, "tokens": [*good["tokens"][:-1], "a"]}  # twice
    yield {**good, "tokens": [*good["tokens"][:-1], ""]}
    yield {**good, "tokens": [*good["tokens"][:-1], "日"]}
    yield {**good, "tokens": [*good["tokens"][:-1], 7]}
    yield {**char, "tokens": ""}
    yield {**char, "tokens": "cba"}
    yield {**char, "tokens": "aab"}
    yield {**char, "tokens": ["a", "b", "c"]}
    yield {**char, "tokens": "ab\ud800"}
    yield {**char, "vocab_size": 4}
    yield {"kind": "byte", "vocab_size": 256, "tokens": ["a"]}
    yield {"kind": "byte", "vocab_size": 65536, "tokens": None}


@pytest.mark.parametrize("saved", list(hostile()))
def test_no_tokenizer_of_ours(saved):
    with pytest.raises(UserError, match="no tokenizer of ours"):
        from_json(saved)


# ---------------------------------------------------------------------------------------------- GPT-2


@cache
def gpt2_shaped():
    """vocab.json and merges.txt with as many entries as GPT-2's, and its letters for bytes, but other merges."""
    letters = [chr(b) for b in [*range(33, 127), *range(161, 173), *range(174, 256)]]
    letters += [chr(256 + i) for i in range(256 - len(letters))]
    pairs = [(a, b) for a in letters for b in letters]
    random.Random(0).shuffle(pairs)
    merges = pairs[:50_000]
    tokens = [*letters, *(a + b for a, b in merges), END]
    vocab = {token: i for i, token in enumerate(tokens)}
    return json.dumps(vocab), "#version: 0.2\n" + "\n".join(f"{a} {b}" for a, b in merges) + "\n"


@pytest.fixture
def gpt2_folder(tmp_path):
    vocab, merges = gpt2_shaped()
    (tmp_path / "vocab.json").write_text(vocab, encoding="utf-8")
    (tmp_path / "merges.txt").write_text(merges, encoding="utf-8")
    return tmp_path


def test_gpt2_files_give_the_ids_that_hugging_face_gives(gpt2_folder):
    hf = pytest.importorskip("tokenizers")
    from tokenizers import models, pre_tokenizers

    ours = from_json(gpt2_tokenizer(gpt2_folder).to_json())
    theirs = hf.Tokenizer(models.BPE.from_file(str(gpt2_folder / "vocab.json"), str(gpt2_folder / "merges.txt")))
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert ours.vocab_size == 50257 and ours.end_token == 50256
    assert ours.encode(TEXT) == theirs.encode(TEXT).ids
    assert ours.decode(ours.encode(TEXT)) == TEXT


def test_gpt2_files_are_found_in_the_cache(gpt2_folder, monkeypatch):
    monkeypatch.setenv("MINUTEGPT_CACHE", str(gpt2_folder))
    assert gpt2_tokenizer().vocab_size == 50257


@pytest.mark.parametrize("damage", ["", "{}", "[1]", '{"a": 0}', "\xff"])
def test_damaged_gpt2_files(gpt2_folder, damage):
    (gpt2_folder / "vocab.json").write_text(damage, encoding="latin-1")
    with pytest.raises(UserError, match="not GPT-2's vocabulary"):
        gpt2_tokenizer(gpt2_folder)


def test_split_patterns_compile_the_same_in_both_engines():
    """The trainer splits with `regex`, the encoder with Rust's: no token may cross a split of the trainer."""
    starts = np.cumsum([0, *(len(word.encode()) for word in tokenizers.regex.findall(PATTERNS["bpe"], TEXT))])
    sizes = bpe().token_bytes()[bpe().encode(TEXT)]
    assert set(starts) <= set(np.cumsum([0, *sizes]).tolist())


def test_where_a_text_without_a_prompt_starts():
    assert char_tokenizer("ab\nc").start_ids() == [0]
    assert char_tokenizer("\tab\nc").start_ids() == [1]
    assert char_tokenizer("ACGT").start_ids() == [0]  # no new line in the vocabulary
    assert byte_tokenizer().start_ids() == [10]
    bpe = train_bpe(["to be or not to be"], 260)
    assert bpe.start_ids() == [bpe.end_token]
