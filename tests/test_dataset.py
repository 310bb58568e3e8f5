"""Windows of a dataset, in an order that misses nothing, and mixtures of datasets by weight."""

import os

import numpy as np
import pytest
from corpora import ids_of, write_ids
from hypothesis import given
from hypothesis import strategies as st

from minutegpt.data import dataset
from minutegpt.data.dataset import (
    Split,
    eval_starts,
    mixture_rows,
    open_data,
    open_split,
    parse_mixture,
    window_starts,
)
from minutegpt.data.tokenizer import char_tokenizer
from minutegpt.errors import UserError


def test_windows_are_the_same_however_the_ids_are_divided():
    """Read in one piece or from shards of any length, some shorter than a window; next to slices of the ids."""
    random = np.random.default_rng(0)
    ids = random.integers(0, 2**16, 5000).astype(np.uint16)
    for cuts in ([], [1000], [100, 130, 131, 4000], list(range(7, 5000, 7))):
        split = Split(np.split(ids, cuts), [(len(ids), 1.0)], {})
        for length in (1, 33, 257):
            starts = random.integers(0, len(ids) - length + 1, 64)
            starts[:2] = 0, len(ids) - length
            expected = np.stack([ids[start : start + length] for start in starts])
            assert (split.windows(starts, length).numpy() == expected).all()
        assert split.windows(np.empty(0, np.int64), 33).shape == (0, 33)
        with pytest.raises(IndexError):
            split.windows(np.array([5, 4968]), 33)


def test_windows_are_int64_tensors_that_cross_shards(tmp_path):
    import torch

    ids = ids_of(5000)
    split = open_split(write_ids(tmp_path / "d", ids, ids[:100], shard_tokens=700), "train", 256)
    starts = np.array([0, 600, 699, 700, 4743, 2000])
    windows = split.windows(starts, 257)
    assert windows.dtype == torch.int64 and windows.shape == (6, 257)
    assert (windows.numpy() == np.stack([ids[s : s + 257] for s in starts])).all()
    with pytest.raises(IndexError):
        split.windows(np.array([4744]), 257)
    with pytest.raises(IndexError):
        split.windows(np.array([-1]), 257)


@given(st.integers(2, 3000), st.integers(1, 400), st.integers(0, 2**70), st.integers(0, 5))
def test_an_epoch_sees_every_window_once(n_tokens, block_size, seed, epoch):
    if n_tokens < block_size + 1:
        with pytest.raises(UserError, match="block_size"):
            window_starts(n_tokens, block_size, seed, np.arange(1))
        return
    n = max(1, n_tokens // block_size - 1)
    starts = window_starts(n_tokens, block_size, seed, np.arange(epoch * n, (epoch + 1) * n))
    assert len(set(starts.tolist())) == n and set(np.diff(np.sort(starts)).tolist()) <= {block_size}
    assert 0 <= starts.min() <= block_size - 1 and starts.max() + block_size + 1 <= n_tokens
    assert n_tokens - n * block_size < 2 * block_size  # tokens that are no one's input this time


def test_order_is_a_pure_function_at_any_world_size():
    rows = np.arange(10_000)
    whole = window_starts(100_000, 64, 7, rows)
    for world_size in (2, 8):
        split = np.empty_like(whole)
        for rank in range(world_size):
            split[rank::world_size] = window_starts(100_000, 64, 7, rows[rank::world_size])
        assert (split == whole).all()
    assert (window_starts(100_000, 64, 7, rows[5000:5003]) == whole[5000:5003]).all()
    n = 100_000 // 64 - 1
    assert (np.sort(whole[:n]) != np.sort(whole[n : 2 * n])).any()  # another offset
    assert (np.argsort(whole[:n]) != np.argsort(whole[n : 2 * n])).any()  # another order
    assert (window_starts(100_000, 64, 8, rows) != whole).any()


@given(st.integers(2, 5000), st.integers(1, 300), st.integers(1, 100))
def test_evaluation_windows(n_tokens, block_size, n_windows):
    starts = eval_starts(n_tokens, block_size, n_windows)
    assert len(starts) == min(n_windows, (n_tokens - 1) // block_size)
    if len(starts):
        assert starts[0] == 0 and starts[-1] + block_size + 1 <= n_tokens
        gaps = np.diff(starts)
        assert (gaps >= block_size).all() and (len(gaps) == 0 or gaps.max() - gaps.min() <= block_size)


def test_no_window_fits(tmp_path):
    folder = write_ids(tmp_path / "d", ids_of(64), ids_of(64))
    assert len(open_split(folder, "train", 63)) == 64
    with pytest.raises(UserError, match=r"block_size 64 is longer than the train split of d.*--block_size=63"):
        open_split(folder, "train", 64)
    short = write_ids(tmp_path / "short", ids_of(64), ids_of(20))  # what is advised fits the other split too
    with pytest.raises(UserError, match=r"longer than the train split of short, which has 64 .*--block_size=19"):
        open_split(short, "train", 64)


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=5), st.integers(0, 10**12))
def test_mixture_counts_in_closed_form(weights, first):
    part, row = mixture_rows(weights, np.arange(3000))
    for i, weight in enumerate(weights):
        assert (row[part == i] == np.arange((part == i).sum())).all()  # each dataset's rows, one after the other
        assert (part == i).sum() / 3000 == pytest.approx(weight / sum(weights), abs=0.001)
    there, its_row = mixture_rows(weights, np.array([first]))
    cycle = mixture_rows(weights, np.array([first % 1000]))
    assert there == cycle[0]
    assert its_row == cycle[1] + first // 1000 * (part[:1000] == there).sum()


def test_mixture_reads_both_by_weight_and_without_a_repeat(tmp_path):
    a = write_ids(tmp_path / "a", np.full(10_000, 1), [1] * 50, shard_tokens=3000)
    write_ids(tmp_path / "b", np.full(5_000, 2), [2] * 50)
    mixed = open_data("a:0.7, b:0.3", "train", 32, tmp_path)
    starts = mixed.starts(32, 1, np.arange(200))
    windows = mixed.windows(starts, 33).numpy()
    assert len(set(starts.tolist())) == 200
    assert ((windows == 1).all(1) | (windows == 2).all(1)).all()  # no window crosses from one to the other
    assert (windows == 1).all(1).sum() == 140
    alone = open_data("a", "train", 32, tmp_path)
    assert (alone.starts(32, 1, np.arange(9)) == window_starts(10_000, 32, 1, np.arange(9))).all()
    assert len(open_split(a, "val")) == 50


def test_only_one_tokenizer_in_a_mixture(tmp_path):
    write_ids(tmp_path / "a", [1] * 100, [1])
    write_ids(tmp_path / "b", [1] * 100, [1], char_tokenizer("abc"))
    with pytest.raises(UserError, match="b has another tokenizer than a"):
        open_data("a,b", "train", data_dir=tmp_path)


def test_parse_mixture():
    assert parse_mixture("shakespeare_char") == {"shakespeare_char": 1.0}
    assert parse_mixture("a:7,b:.3") == {"a": 7.0, "b": 0.3}
    names = ("", "../a", "a/b", ".", "..", "a,,b", "a:1,a:2")
    for wrong in (*names, "a:", "a:x", "a:-1", "a:0", "a:1e5", "a:nan", "a:1.2.3", "a:."):
        with pytest.raises(UserError, match="--dataset="):
            parse_mixture(wrong)


def test_large_data_is_verified_once_per_size_and_time_stamp(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "ALWAYS_VERIFIED", 1000)
    folder = write_ids(tmp_path / "d", ids_of(2500), [1])
    path = folder / "train_000001.bin"
    open_split(folder, "train")
    stamp, raw = path.stat().st_mtime_ns, bytearray(path.read_bytes())
    raw[100] ^= 1
    path.write_bytes(raw)
    os.utime(path, ns=(stamp, stamp))
    open_split(folder, "train")  # same size, same stamp: not read again
    os.utime(path, ns=(stamp, stamp + 10**9))
    with pytest.raises(UserError, match="damaged"):
        open_split(folder, "train")
    monkeypatch.setattr(dataset, "ALWAYS_VERIFIED", 10**9)
    os.utime(path, ns=(stamp, stamp))
    with pytest.raises(UserError, match="damaged"):
        open_split(folder, "train")


@pytest.mark.parametrize("dataset", ["a:0.9996,b:0.0004", "a:1,b:1,c:0.0001", "a:0.00001,b:1"])
def test_a_weight_too_small_to_be_drawn_is_refused_by_name(dataset):
    name = "b" if dataset.startswith("a:0.9") else "c" if "c" in dataset else "a"
    with pytest.raises(UserError, match=rf"the weight of {name} is .* never drawn. Give it more weight"):
        parse_mixture(dataset)


@given(st.floats(0.0001, 0.01))
def test_a_weight_that_is_taken_is_drawn(weight):
    try:
        weights = list(parse_mixture(f"a:1,b:{weight:.6f}").values())
    except UserError:
        assert weight < 0.0011
        return
    assert (mixture_rows(weights, np.arange(1000))[0] == 1).any()


def test_validation_of_a_mixture_follows_the_weights(tmp_path):
    """The mean loss over the windows is the weighted mean of the datasets' losses: here id 1 costs 1, id 9 costs 9."""
    write_ids(tmp_path / "a", [1] * 100, np.full(5000, 1))
    write_ids(tmp_path / "b", [9] * 100, np.full(40_000, 9))
    for weights, expected in (
        ("a:0.75,b:0.25", 3.0),
        ("a:0.25,b:0.75", 7.0),
        ("a:1,b:1", 5.0),
        ("a:0.999,b:0.001", 1.0),
    ):
        split = open_data(weights, "val", 10, tmp_path)
        starts = split.eval_starts(10, 400)
        windows = split.windows(starts, 11).numpy()
        assert ((windows == 1).all(1) | (windows == 9).all(1)).all()  # none crosses from one to the other
        assert windows.mean() == pytest.approx(expected, abs=0.05)
        assert len(starts) in (400, 401)
    short = open_data("a:0.5,b:0.5", "val", 1000, tmp_path)  # a has 4 windows: they are repeated
    assert (short.windows(short.eval_starts(1000, 40), 1001) == 1).all(1).float().mean() == 0.5


def test_validation_of_one_dataset_is_as_it_was(tmp_path):
    write_ids(tmp_path / "a", [1] * 100, ids_of(5000))
    assert (open_data("a", "val", 10, tmp_path).eval_starts(10, 77) == eval_starts(5000, 10, 77)).all()


def test_a_fingerprint_names_the_content(tmp_path):
    a = write_ids(tmp_path / "a", ids_of(2500), ids_of(100))
    write_ids(tmp_path / "b", ids_of(2500), ids_of(100))
    write_ids(tmp_path / "c", ids_of(2500), ids_of(100, 1))
    prints = {name: open_data(name, "train", data_dir=tmp_path).fingerprint for name in ("a", "b", "c", "a,b", "b,c")}
    assert prints["a"] == prints["b"] == open_split(a, "val").fingerprint == open_split(a, "train").meta["fingerprint"]
    assert len({prints[name] for name in ("a", "c", "a,b", "b,c")}) == 4
    assert all(len(value) == 16 for value in prints.values())
