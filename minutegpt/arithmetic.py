"""Arithmetic coding: symbols with probabilities become a file of -sum log2 p bits, to within one byte.

The file is the digits of one number between 0 and 1. Each symbol owns a part of the interval, as wide as its
probability, and the number lies in the part of the symbol that comes next:

    0        A (1/2)        0.5     B (1/4)     0.75     C (1/4)     1
                            |-- A 1/8 --|- B --|- C -|                    after "B", the interval is [0.5, 0.75)

A message of probability p ends in an interval of width p, and about -log2 p binary digits name a number in it.
Shannon's bound is the same (1948), so no code is shorter on average. Both sides must compute equal intervals.

    encoder = Encoder()
    for edges, symbol in message:  # symbol i owns edges[i] to edges[i + 1], in units of 1 / TOTAL of the interval
        encoder.code(edges, symbol)
    decoder = Decoder(encoder.finish())
    first = decoder.code(first_edges)  # and so on, with the same edges in the same order

The interval has 64 bits, of which the leading bytes are written as soon as the interval is narrow enough: a range coder
(Martin 1979; Witten, Neal and Cleary 1987, "Arithmetic coding for data compression"). One coder serves all streams of
compress.py, so that its last byte is paid once. rANS (Duda, arXiv 1311.2540) would be as small, but it decodes from the
last symbol to the first.
"""

import numpy as np

TOTAL = 2**32  # the edges of a symbol are multiples of 1 / TOTAL
WHOLE = 2**64  # the width of the interval at the start
NARROW = 2**56  # below this width, one more byte is written
BYTES = np.arange(257) * (TOTAL // 256)  # edges of 256 equally likely symbols


class Damaged(ValueError):
    """The bytes are not what an encoder with the same edges wrote."""


class Encoder:
    """The number so far is the digits in `out`, then `low`. The interval goes from there to low + width."""

    def __init__(self) -> None:
        self.out, self.low, self.width = bytearray(), 0, WHOLE

    def code(self, edges: np.ndarray, symbol: int) -> int:
        """Narrows the interval to the part of the symbol. edges: increasing, (n + 1,). Returns the symbol."""
        unit = self.width // TOTAL
        self.low += unit * int(edges[symbol])
        self.width = unit * int(edges[symbol + 1] - edges[symbol])
        while self.width < NARROW:
            self._write_byte()
        return symbol

    def _write_byte(self) -> None:
        carry, self.low = divmod(self.low, WHOLE)
        if carry:  # as in 0.1999 + 0.0001: each 9 becomes 0, and the digit before them grows by one
            i = len(self.out) - 1
            while self.out[i] == 255:
                self.out[i], i = 0, i - 1
            self.out[i] += 1
        byte, self.low = divmod(self.low, NARROW)
        self.out.append(byte)
        self.low, self.width = self.low * 256, self.width * 256

    def finish(self) -> bytes:
        """The file. Its last byte names the first multiple of NARROW in the interval; zeros follow."""
        self.low += NARROW - 1
        self._write_byte()
        return bytes(self.out)


class Decoder:
    """The inverse. `value` is how far the number lies above the lower end of the interval."""

    def __init__(self, data: bytes) -> None:
        self.data, self.position, self.width = data + bytes(7), 8, WHOLE  # the encoder left out 7 zeros
        self.value = int.from_bytes(self.data[:8], "big")

    def code(self, edges: np.ndarray, symbol: int = -1) -> int:
        """The next symbol. The argument `symbol` is not used: both coders are called in the same way."""
        unit = self.width // TOTAL
        symbol = int(edges.searchsorted(self.value // unit, "right")) - 1
        if symbol + 1 == len(edges):
            raise Damaged("the number is above the last edge")
        self.value -= unit * int(edges[symbol])
        self.width = unit * int(edges[symbol + 1] - edges[symbol])
        while self.width < NARROW:
            if self.position >= len(self.data):
                raise Damaged("the bytes end too early")
            self.value = self.value * 256 + self.data[self.position]
            self.width, self.position = self.width * 256, self.position + 1
        return symbol
