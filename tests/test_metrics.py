"""minutegpt/metrics.py: each metric against a slow computation of the same, and documents that end at the END id."""

import doctest
import math
import re
from itertools import pairwise

import numpy as np
import pytest
import torch

from minutegpt import metrics
from minutegpt.data.dataset import Split
from minutegpt.data.tokenizer import END, byte_tokenizer, char_tokenizer, train_bpe
from model import GPT, GPTConfig

TRAIN = "".join(f"{i} bottles of beer on the wall, {i} bottles of beer.\n" for i in range(30, 0, -1))
VAL = "naïve 7 bottles of ☕ on the wall, take one down, 6 bottles of 東京.\n"


def split_of(ids, tokenizer=None):
    meta = {"tokenizer": tokenizer.to_json()} if tokenizer else {}
    return Split([np.array(ids, np.uint16)], [(len(ids), 1.0)], meta)


def test_the_examples_of_the_docstrings():
    assert doctest.testmod(metrics) == (0, 4)


def test_the_summary_of_a_mixture_is_the_mean_by_weight():
    tokenizer = byte_tokenizer()
    one, two = b"some words of one text", b"others and more of them, of another text"
    data = Split([np.frombuffer(one, np.uint8), np.frombuffer(two, np.uint8)], [(len(one), 3.0), (len(two), 1.0)], {})
    assert [bytes(part.tokens(0, len(part)).tolist()) for part in data.datasets()] == [one, two]
    parts = [
        metrics.summarize("val", nats, part, tokenizer, 0.0)
        for nats, part in zip((40.0, 100.0), data.datasets(), strict=True)
    ]
    result = metrics.mixture_summary(parts, data)
    losses = 40 / (len(one) - 1), 100 / (len(two) - 1)
    assert result["loss"] == pytest.approx(0.75 * losses[0] + 0.25 * losses[1])
    assert result["bits_per_byte"] == pytest.approx(result["loss"] / math.log(2))  # a byte per token
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    assert result["tokens"] == len(one) + len(two) - 2 and result["words"] == 5 + 8
    assert math.log(result["word_perplexity"]) == pytest.approx(0.75 * 40 / 5 + 0.25 * 100 / 8)
    assert [part["loss"] for part in result["parts"]] == pytest.approx(losses)
    assert metrics.mixture_summary(parts[:1], data) == parts[0]


def test_another_tokenizer_keeps_the_datasets_of_a_mixture():
    old, new = byte_tokenizer(), train_bpe([TRAIN], 280)
    texts = [TRAIN.encode(), VAL.encode()]
    arrays = [np.frombuffer(text, np.uint8) for text in texts]
    data = metrics.reencode(Split(arrays, [(len(texts[0]), 0.7), (len(texts[1]), 0.3)], {}), old, new)
    assert [weight for _, weight in data.parts] == [0.7, 0.3]
    assert [new.decode_bytes(part.tokens(0, len(part)).tolist()) for part in data.datasets()] == texts


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 100])
@pytest.mark.parametrize("stride", [0, 1, 5, 15, 16])
def test_each_prediction_is_scored_once_with_as_much_context_as_fits(n, stride):
    T = min(16, n)
    context = []  # of each prediction: how many tokens are before it
    for start, length, scored in metrics.scoring_windows(n, T, min(stride, T)):
        assert length <= T and start + length - scored == len(context) and start + length <= n
        context += range(length - scored + 1, length + 1)
    assert len(context) == n and context[:T] == list(range(1, T + 1))
    if 0 < stride < T:
        assert min(context[T:], default=T) > T - stride - 1


@pytest.mark.parametrize("pieces", [["to be\n", "or", "not", " to be "], ["a" * 3, "", "b c", "d\ne", "\n"]])
def test_words_are_counted_across_pieces(pieces):
    assert metrics.count_words(piece.encode() for piece in pieces) == len("".join(pieces).split())


def test_counting_pairs_goes_piece_by_piece_and_each_row_sums_to_one(monkeypatch):
    tokens = np.random.default_rng(0).integers(0, 7, 500).astype(np.uint16)
    train, data = (Split([part], [(len(part), 1.0)], {}) for part in (tokens[:90], tokens[90:]))
    whole = metrics.bigram_nats(train, data, 9)
    monkeypatch.setattr(metrics, "PIECE", 13)
    assert metrics.bigram_nats(train, data, 9) == (pytest.approx(whole[0]), whole[1])
    assert whole[1] == len(set(pairwise(tokens[:90].tolist())))
    for i in (0, 8):  # 8 never occurs: then it is the tokens' own frequency
        pair = [Split([np.array([i, j], np.uint16)], [(2, 1.0)], {}) for j in range(9)]
        assert sum(math.exp(-metrics.bigram_nats(train, p, 9)[0]) for p in pair) == pytest.approx(1)
    one = Split([tokens[:1]], [(1, 1.0)], {})
    assert math.isfinite(metrics.bigram_nats(one, data, 9)[0])  # nothing to count in it


def test_what_is_recited_is_found_again_byte_for_byte(monkeypatch):
    monkeypatch.setattr(metrics, "SPAN", 6)
    training = b"the quick brown fox, the lazy dog"
    texts = [b"a quick brown dog", b"", b"xxx", b"the quicker lazy dog the quick"]
    known, copied = metrics.overlap_with_training(texts, training)
    words = "a quick brown dog xxx the quicker lazy dog the quick".split()
    assert known == sum(word in re.findall(r"\w+", training.decode()) for word in words) / len(words)
    covered = 0
    for text in texts:
        spans = [range(i, i + 6) for i in range(len(text) - 5) if text[i : i + 6] in training]
        covered += len({place for span in spans for place in span})
    assert copied == covered / sum(map(len, texts)) and 0.3 < copied < 1
    assert metrics.overlap_with_training([b""], training) == (0, 0)
    assert metrics.overlap_with_training([training], training) == (1, 1)


# ---------------------------------------------------------------------------------------- documents


def test_documents_stay_apart_when_they_are_encoded_again():
    bpe, byte = train_bpe([TRAIN], 280), byte_tokenizer()
    ids = [*bpe.encode("9 bottles"), bpe.end_token, *bpe.encode("of beer"), bpe.end_token]
    data = split_of(ids)
    other = train_bpe([VAL], 290)
    again = metrics.reencode(data, bpe, other)
    end = other.end_token
    assert again.tokens(0, len(again)).tolist() == [*other.encode("9 bottles"), end, *other.encode("of beer"), end]
    plain = metrics.reencode(data, bpe, byte)
    assert byte.decode(plain.tokens(0, len(plain)).tolist()) == "9 bottlesof beer"


LETTERS = f"one {END} two{END}three "  # a text about tokenizers, and not three documents


def test_a_document_ends_at_the_id_and_not_at_its_letters():
    bpe, byte = train_bpe([TRAIN], 280), byte_tokenizer()
    ids = [*bpe.encode(LETTERS), bpe.end_token, *bpe.encode("four")]
    assert ids.count(bpe.end_token) == 1
    data = split_of(ids)
    texts = [bpe.decode(document.tolist()) for document in metrics.documents(data.tokens(0, len(data)), bpe)]
    assert texts == [LETTERS, "four"]
    other = train_bpe([VAL], 290)
    again = metrics.reencode(data, bpe, other)
    assert again.tokens(0, len(again)).tolist() == [*other.encode(LETTERS), other.end_token, *other.encode("four")]
    for new in (byte, char_tokenizer(LETTERS + "fourt")):
        again = metrics.reencode(data, bpe, new)
        assert new.decode(again.tokens(0, len(again)).tolist()) == LETTERS + "four"
        back = metrics.reencode(again, new, bpe)
        assert back.tokens(0, len(back)).tolist() == bpe.encode(LETTERS + "four")


def test_words_bytes_and_memorization_go_by_the_id_too(monkeypatch):
    bpe, byte = train_bpe([TRAIN], 280), byte_tokenizer()
    ids = [*bpe.encode(LETTERS), bpe.end_token, *bpe.encode("four")]
    for piece in (1, 3, 1000):  # tokens that are read at a time
        monkeypatch.setattr(metrics, "PIECE", piece)
        result = metrics.summarize("val", 1.0, split_of(ids), bpe, 0.0)
        assert result["words"] == len(f"{LETTERS} four".split()) == 4
        assert result["bytes"] == len(LETTERS + "four") - len(bpe.decode(ids[:1]))
        plain = metrics.summarize("val", 1.0, split_of(byte.encode(LETTERS + "four")), byte, 0.0)
        assert plain["words"] == len((LETTERS + "four")[1:].split()) and plain["bytes"] == len(LETTERS + "four") - 1
    assert b"".join(metrics.text_pieces(split_of(ids), bpe)) == f"{LETTERS}\nfour".encode()


def test_what_a_model_writes_holds_no_padding_and_starts_where_samples_do():
    """A vocabulary padded from 4 ids to 16, of which the padding would be drawn most."""
    tokenizer = char_tokenizer("ACGT")
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=16, n_layer=1, n_head=1, n_embd=8)).eval()
    with torch.no_grad():
        model.lm_head.weight[4:] *= 100
    data = split_of(tokenizer.encode("ACGT" * 50), tokenizer)
    result = metrics.memorization(model, tokenizer, data, data, 40, 1.0)
    assert result["tokens"] == 40 and result["text_copied"] == 0  # shorter than SPAN
    assert model(torch.zeros(1, 1, dtype=torch.int64))[0].shape == (1, 1, 16)  # and it is as it was
