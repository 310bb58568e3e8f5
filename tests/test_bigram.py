import math
import os
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import bigram

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments, **options):
    command = [sys.executable, str(ROOT / "bigram.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, encoding="utf-8", cwd=ROOT, timeout=60, **options)


def losses(output):
    """{step: loss} and the counted entropy from what the script prints."""
    lines = [line.split() for line in output.splitlines()]
    steps = {int(words[1]): float(words[3]) for words in lines if words[:1] == ["step"]}
    (counted,) = (float(words[2]) for words in lines if words[:2] == ["counting", "pairs"])
    return steps, counted


def entropy_by_counting(text):
    """Pair by pair in plain python: the mean of -ln(pairs ab / pairs that begin with a)."""
    pairs = list(pairwise(text))
    both, first = Counter(pairs), Counter(a for a, _ in pairs)
    return -sum(math.log(both[pair] / first[pair[0]]) for pair in pairs) / len(pairs)


def counts_of(text):
    kinds = sorted(set(text))
    return bigram.count_pairs(np.array([kinds.index(c) for c in text]), len(kinds)), kinds


def test_counts_and_entropy():
    counts, kinds = counts_of("abab cab")
    for i, a in enumerate(kinds):
        for j, b in enumerate(kinds):
            assert counts[i, j] == sum(pair == (a, b) for pair in pairwise("abab cab"))
    assert bigram.entropy(counts) == pytest.approx(entropy_by_counting("abab cab"), abs=1e-12)


def test_loss_is_cross_entropy_of_the_pairs():
    counts, kinds = counts_of(bigram.SENTENCE)
    W = np.random.default_rng(0).normal(size=counts.shape)
    expected = 0.0
    for a, b in pairwise(bigram.SENTENCE):
        p = np.exp(W[kinds.index(a)]) / np.exp(W[kinds.index(a)]).sum()
        expected -= math.log(p[kinds.index(b)]) / (len(bigram.SENTENCE) - 1)
    assert bigram.loss_and_gradient(W, counts)[0] == pytest.approx(expected, rel=1e-12)


def test_gradient_against_finite_differences():
    counts, _ = counts_of("hello hello, yellow fellow")
    W = np.random.default_rng(1).normal(size=counts.shape)
    _, gradient = bigram.loss_and_gradient(W, counts)
    numeric = np.zeros_like(W)
    for at in np.ndindex(*W.shape):
        up, down = W.copy(), W.copy()
        up[at] += 1e-5
        down[at] -= 1e-5
        numeric[at] = (bigram.loss_and_gradient(up, counts)[0] - bigram.loss_and_gradient(down, counts)[0]) / 2e-5
    np.testing.assert_allclose(gradient, numeric, atol=1e-9)
    assert np.abs(gradient).max() > 0.01


def test_large_scores_do_not_overflow():
    counts, _ = counts_of("abcabd")
    loss, gradient = bigram.loss_and_gradient(np.diag([1e4] * 4), counts)
    assert np.isfinite(loss) and np.isfinite(gradient).all()


def test_it_never_climbs_and_ends_at_the_counts(capsys):
    counts, _ = counts_of(bigram.SENTENCE)
    W = bigram.train(counts)
    steps, _ = losses(capsys.readouterr().out + "counting pairs 0")
    assert list(steps.values()) == sorted(steps.values(), reverse=True)
    p = np.exp(W) / np.exp(W).sum(1, keepdims=True)
    rows = counts.sum(1) > 0
    np.testing.assert_allclose(p[rows], counts[rows] / counts[rows].sum(1, keepdims=True), atol=0.01)


def test_sample_follows_the_softmax():
    W = np.log(np.array([[0.1, 0.9, 1e-30], [0.5, 0.25, 0.25], [1.0, 1.0, 1.0]]))
    ids = np.array(bigram.sample(W, 1, 20_000, np.random.default_rng(0)))
    assert len(ids) == 20_000 and ids[0] == 1
    found = bigram.count_pairs(ids, 3)
    np.testing.assert_allclose(found[1] / found[1].sum(), [0.5, 0.25, 0.25], atol=0.02)
    assert found[0, 2] == 0
    assert ids.tolist() == bigram.sample(W, 1, 20_000, np.random.default_rng(0))


@pytest.mark.parametrize("text", [None, "ab", "aa", "no end of line, one rare \u00e9 and a \u4e2d"])
def test_script_goes_from_ln_v_to_the_entropy(tmp_path, text):
    if text is not None:
        (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    done = run(*([] if text is None else [tmp_path / "text.txt"]), env=os.environ | {"PYTHONIOENCODING": "utf-8"})
    assert done.returncode == 0, done.stderr
    text = bigram.SENTENCE if text is None else text
    steps, counted = losses(done.stdout)
    assert counted == pytest.approx(entropy_by_counting(text), abs=1e-4)
    assert steps[0] == pytest.approx(math.log(len(set(text))), abs=1e-4)
    assert counted - 1e-4 <= steps[max(steps)] <= counted + 0.01
    drawn = done.stdout.split(f"counting pairs    {counted:.4f}\n\n")[1]
    assert set(drawn) <= set(text) | {"\n"} and len(drawn) == 301


def test_marks_and_line_ends_are_read_as_prepare_reads_them(tmp_path):
    """Without the byte order mark, and with the line ends as they are: the same characters as prepare/text.py finds."""
    from minutegpt.data.readers import read_text

    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbf" + b"one\r\ntwo\rthree\n" * 20)
    text = "".join(read_text(path))
    done = run(path)
    assert done.stdout.startswith(f"{len(text)} tokens of {len(set(text))} kinds")
    assert losses(done.stdout)[1] == pytest.approx(entropy_by_counting(text), abs=1e-4)


def test_utf_16_without_a_mark_is_refused(tmp_path):
    (tmp_path / "text.txt").write_bytes("plain words\n".encode("utf-16-le") * 20)
    done = run(tmp_path / "text.txt")
    assert done.returncode == 2 and "character 1 is a NUL, so it is not UTF-8. Save it as UTF-8" in done.stderr


def test_many_kinds_of_characters_become_bytes(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "text.txt").write_text("".join(map(chr, rng.integers(0x4E00, 0x9000, 5000))), encoding="utf-8")
    done = run(tmp_path / "text.txt")
    steps, counted = losses(done.stdout)
    assert done.returncode == 0 and steps[max(steps)] <= counted + 0.01
    assert done.stdout.startswith("15,000 tokens")


def test_a_console_without_the_characters(tmp_path):
    (tmp_path / "text.txt").write_text("\u4e2d\u6587 \u4e2d\u6587", encoding="utf-8")
    done = run(tmp_path / "text.txt", env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and "?" in done.stdout


@pytest.mark.parametrize("content", [None, b"", b"a", b"caf\xe9", b"\xff\xfea\0b\0"])
def test_a_file_it_cannot_learn_from_is_one_clear_line(tmp_path, content):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    done = run(path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and str(path) in done.stderr


def test_help():
    assert "python bigram.py [FILE]" in run("--help").stdout


def test_python_without_numpy_uses_the_environment_beside_it(tmp_path):
    """A Python of the same standard library that finds no numpy: the script goes on in .venv or says what to type."""
    done = subprocess.run(
        [sys.executable, "-S", "-E", str(ROOT / "bigram.py")],  # -S: no site-packages
        capture_output=True,
        encoding="utf-8",
        timeout=60,
    )
    if (ROOT / ".venv").exists():
        assert done.returncode == 0 and "counting pairs" in done.stdout
    else:
        assert done.returncode == 2 and "uv sync" in done.stderr


def test_tiny_shakespeare():
    path = ROOT.parent / "shared" / "data" / "tinyshakespeare.txt"
    if not path.exists():
        pytest.skip("no text at " + str(path))
    steps, counted = losses(run(path).stdout)
    assert steps[0] == pytest.approx(math.log(65), abs=1e-4)
    assert counted == pytest.approx(entropy_by_counting(path.read_text(encoding="utf-8")), abs=1e-4)
    assert counted <= steps[max(steps)] <= counted + 0.01
