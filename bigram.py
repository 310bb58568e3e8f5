"""The whole idea of a language model on one page of numpy: `python bigram.py [FILE]`

It predicts the next character from the one before it. The model is one matrix W (V, V) over the V different
characters of the text: row i holds a score for each character that may follow character i. Training works as in
train.py: softmax, cross-entropy, gradient, a small step downhill, again. A GPT changes one thing: its scores come
from all the characters before, not from one.

The loss is the mean of -ln p(next character), in nats. A loss L is as uncertain as a choice of exp(L) characters.
"""

import os
import sys

try:
    import numpy as np
except ModuleNotFoundError:
    import minutegpt.errors  # noqa: F401, I001  starts this again with .venv's Python, which has numpy
    import numpy as np

SENTENCE = "she sells sea shells by the sea shore; the shells she sells are sea shells for sure.\n"


def count_pairs(ids, V):
    """How often j follows i, (V, V). "abab", as 0 1 0 1, has ab twice and ba once: [[0, 2], [1, 0]]."""
    return np.bincount(ids[:-1] * V + ids[1:], minlength=V * V).reshape(V, V)


def entropy(counts):
    """The lowest loss that such a model can reach on this text, where p(j after i) = count / sum of the row."""
    i, j = counts.nonzero()
    return -(counts[i, j] * np.log(counts[i, j] / counts.sum(1)[i])).sum() / counts.sum()


def loss_and_gradient(W, counts):
    """The mean cross-entropy over all pairs, and its derivative with respect to W (V, V)."""
    z = W - W.max(1, keepdims=True)  # softmax ignores a shift, and exp of a large score would overflow
    logp = z - np.log(np.exp(z).sum(1, keepdims=True))  # (V, V) ln p(j after i)
    loss = -(counts * logp).sum() / counts.sum()
    # one pair (i, j) adds p - onehot(j) to row i; all pairs that begin with i have the same p, so add them at once
    gradient = (counts.sum(1, keepdims=True) * np.exp(logp) - counts) / counts.sum()  # (V, V)
    return loss, gradient


def train(counts, steps=3000, learning_rate=2.0):
    """Gradient descent from W = 0, where every next character is equally likely, so the loss begins at ln V."""
    W = np.zeros(counts.shape)
    # a rare character has a small gradient, so divide each row's step by its share of the pairs (in train.py, Adam
    # finds such scales). The curvature of a softmax is at most 1/2, so a learning rate of 2 never raises the loss
    share = np.maximum(counts.sum(1, keepdims=True), 1) / counts.sum()  # (V, 1)
    for step in range(steps + 1):
        loss, gradient = loss_and_gradient(W, counts)
        if step in (0, 1, 10, 100, 1000, steps):
            print(f"step {step:5d}   loss {loss:.4f}")
        W -= learning_rate * gradient / share
    return W


def sample(W, start, length, rng):
    """Draws a character from the softmax of the last one's row, appends it, and repeats. Returns `length` ids."""
    p = np.exp(W - W.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)  # (V, V)
    ids = [start]
    for _ in range(length - 1):
        ids.append(rng.choice(len(p), p=p[ids[-1]]))
    return ids


def main(arguments):
    if len(arguments) > 1 or arguments in (["-h"], ["--help"]):
        return print(__doc__)
    try:
        # as prepare/text.py reads it: without a byte order mark, and with the line ends of the file
        text = open(arguments[0], encoding="utf-8-sig", newline="").read() if arguments else SENTENCE
        if len(text) < 2:
            raise ValueError("a pair takes at least 2 characters. Name a longer text")
        if "\0" in text:  # UTF-16 is read as UTF-8 with a NUL after each letter
            raise ValueError(f"character {text.index(chr(0))} is a NUL, so it is not UTF-8. Save it as UTF-8")
    except (OSError, ValueError) as error:
        return f"error: cannot learn from {arguments[0]}: {error}"
    # one number per character; with thousands of them (as in Chinese) W would be huge, so take one per byte
    encoding, number = ("utf-32-le", "<u4") if len(set(text)) <= 256 else ("utf-8", "u1")
    vocabulary, ids = np.unique(np.frombuffer(text.encode(encoding), number), return_inverse=True)
    V = len(vocabulary)
    print(f"{len(ids):,} tokens of {V} kinds, ln V = {np.log(V):.4f}")
    counts = count_pairs(ids, V)
    W = train(counts)
    print(f"counting pairs    {entropy(counts):.4f}\n")
    drawn = sample(W, ids[0], 300, np.random.default_rng(1337))
    print(vocabulary[drawn].tobytes().decode(encoding, errors="replace"))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # type: ignore  # a console may lack some of the characters
    try:
        problem = main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has ended
        os._exit(0)
    if problem:
        print(problem, file=sys.stderr)
        sys.exit(2)
