"""A trained model as a lossless compressor. The first command writes FILE.mgpt, the second one writes FILE again:

    python compress.py --out_dir=out-shakespeare-char FILE
    python compress.py --out_dir=out-shakespeare-char --decompress FILE.mgpt

A language model's loss is a file's size. Arithmetic coding (minutegpt/arithmetic.py) spends -log2 p bits on a token of
probability p, so a text takes the sum of its losses. Such a loss cannot be faked: the model gives the text back from
the file (Shannon 1948; Delétang et al. 2023, "Language modeling is compression", arXiv 2309.10668).

The decoder must compute the encoder's probabilities to the last bit. So both run one loop, `code`, with the same shapes
in each step, and the file names the machine and the PyTorch build whose arithmetic it needs.
"""

import minutegpt.errors  # noqa: F401, I001  first: it finds the environment that has torch

import bz2
import hashlib
import lzma
import math
import sys
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from json import dumps
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from minutegpt.arithmetic import BYTES, TOTAL, Damaged, Decoder, Encoder
from minutegpt.checkpoint import load_model
from minutegpt.config import configure
from minutegpt.data.tokenizer import Tokenizer
from minutegpt.device import auto_kind, init_machine
from minutegpt.errors import UserError
from minutegpt.files import atomic_write
from minutegpt.mgpt import Header, pack, requirements, to_bytes, to_symbols, unpack
from model import GPT, GPTConfig, KVCache

# ----------------------------------------------------------------------------------------------------------------
# every setting, with its default; --key=value overrides it
file = ""  # what is compressed, or the FILE.mgpt that is decompressed; the word without dashes
out_dir = "out"  # the run's folder
ckpt = "best"  # best (lowest validation loss), latest
decompress = False  # write the original file again
to = ""  # where to; default: FILE.mgpt, and FILE for FILE.mgpt
overwrite = False  # replace what is there
streams = 0  # parts of the file that are coded at once; more are faster, fewer are smaller. 0: by the file's length
json = False  # print one JSON object on one line
dataset = ""  # the dataset that has the vocabulary, for a checkpoint without one: nanoGPT's
device = "auto"  # auto, cpu, cuda, mps
# ----------------------------------------------------------------------------------------------------------------
KEPT = 8  # a full context is read again from its last eighth: a quarter costs time and saves no bits
CHECKED = 2**14  # after so many symbols, two bytes check them: 0.1% of a text
MOST_STREAMS, MEMORY = 1024, 2**32  # the most streams, and the most bytes for them, that a stranger's file can ask for


# -- the model and the coder


def intervals(logits: Tensor, escape: int) -> np.ndarray:
    """logits (S, V) -> edges for the coder (S, V + 2): each token's part of TOTAL, at least 1, then the escape's."""
    S, V = logits.shape
    widths = (logits.softmax(-1) * (TOTAL - V - escape)).long() + 1  # (S, V)
    ends = torch.cat((widths, torch.full((S, 1), escape)), dim=1).cumsum(1)  # (S, V + 1), at most TOTAL
    return torch.cat((torch.zeros(S, 1, dtype=torch.int64), ends), dim=1).numpy()


@torch.inference_mode()
def code(
    model: GPT, tokenizer: Tokenizer, coder: Encoder | Decoder, *, n: int, rows: int, escape: int,
    symbols: np.ndarray | None = None, progress: Callable[[int], object] = lambda coded: None,
) -> tuple[np.ndarray, float]:  # fmt: skip
    """Encodes symbols (n,), or decodes n symbols, in S = rows streams. Returns them, and their loss in bits.

    Stream s has the L symbols from s L on. Each step codes one symbol of each stream. A symbol is a token, or V + a
    byte that no token has: an escape, whose part of TOTAL is `escape`, and then 8 bits.
    Raises Damaged where the coder's bytes were not written with these predictions.
    """
    V, context, L = tokenizer.vocab_size, model.config.block_size, -(-n // rows)
    weight, start, check, bits = model.lm_head.weight, tokenizer.start_ids()[0], 0, 0.0
    cache = KVCache(model.config, rows, weight.device, weight.dtype)
    every = max(1, CHECKED // rows)  # steps
    columns = [
        np.full(rows, start, np.int32)
    ]  # (S,) each. The model reads `start` before the first symbol, and for a byte
    for t in range(L):
        new = columns[-1:]
        if cache.length == context:  # of all streams. GPT.stream refills a full cache in the same way
            cache.length, new = 0, columns[-max(1, context // KEPT) :]
        tokens = torch.from_numpy(np.stack(new, axis=1)).long()  # (S, 1) or (S, context / KEPT)
        tokens = torch.where(tokens < V, tokens, start).to(weight.device)
        logits = model.next_logits(tokens, cache)[:, :V].cpu().double()  # (S, V)
        if not logits.isfinite().all():
            raise UserError("the model's predictions are not finite, so its weights are damaged. Try --ckpt=latest")
        edges, column = intervals(logits, escape), np.zeros(rows, np.int32)
        coded = -(-(n - t) // L)  # streams: the last ones may be shorter
        wanted = [-1] * coded if symbols is None else symbols[t::L].tolist()
        for s in range(coded):
            symbol = coder.code(edges[s], min(wanted[s], V))
            column[s] = symbol if symbol < V else V + coder.code(BYTES, wanted[s] - V)
        columns.append(column)
        check = zlib.crc32(column.tobytes(), check)
        if t % every == every - 1:  # all symbols so far, in 16 bits
            for byte in divmod(check % 2**16, 256):
                if coder.code(BYTES, byte) != byte:
                    raise Damaged(f"the check after {t + 1} steps fails")
        if symbols is not None:
            p = logits.softmax(-1).numpy()[np.arange(coded), np.minimum(column, V - 1)[:coded]]
            bits += float(np.where(column[:coded] < V, -np.log2(p), 8 - math.log2(escape / TOTAL)).sum())
        progress(coded)
    return np.stack(columns[1:], axis=1).ravel()[:n], bits


def most_streams(config: GPTConfig, memory: int = MEMORY) -> int:
    """How many streams fit in so many bytes; 1 at least."""
    each = KVCache(config, 1, torch.device("meta"), torch.float32).bytes()
    each += 16 * config.block_size * config.n_embd + 40 * config.vocab_size  # of a refill; of the edges
    return max(1, min(MOST_STREAMS, memory // each))


def choose_streams(n: int, config: GPTConfig) -> int:
    """256 where each has 4 contexts of tokens: its first tokens have few before them, so they cost more."""
    return max(1, min(256, n // (4 * config.block_size), most_streams(config, MEMORY // 4)))


# -- a whole file


def compress_bytes(
    raw: bytes, model: GPT, tokenizer: Tokenizer, needs: list[str], streams: int = 0, **options: Any
) -> tuple[bytes, dict[str, Any]]:
    """The compressed file, and figures of it. needs: of minutegpt/mgpt.py. streams: 0 chooses."""
    V, symbols = tokenizer.vocab_size, to_symbols(raw, tokenizer)
    n, escapes = len(symbols), int((symbols >= V).sum())
    rows = min(streams or choose_streams(n, model.config), n)
    if rows > most_streams(model.config):
        raise UserError(f"--streams={streams} would take more than {MEMORY / 1e9:.1f} GB. Type a smaller number")
    escape, encoder, bits = max(1, min(TOTAL - 2 * V, escapes * TOTAL // max(1, n))), Encoder(), 0.0
    if n:
        _, bits = code(model, tokenizer, encoder, n=n, rows=rows, escape=escape, symbols=symbols, **options)
    payload = encoder.finish()
    figures = {"tokens": n, "escapes": escapes, "streams": rows, "coder_bytes": len(payload), "model_bytes": bits / 8}
    if len(payload) >= len(raw):  # noise, or a language that the model does not know
        payload, rows = raw, 0
    return pack(Header(hashlib.sha256(raw).digest(), len(raw), n, escape, rows), needs, payload), figures


def decompress_bytes(
    name: str, data: bytes, model: GPT, tokenizer: Tokenizer, needs: list[str], **options: Any
) -> bytes:
    """The original. name: of the file, for messages. Raises UserError where the file or what it needs is another."""
    header, payload = unpack(name, data, needs)
    n, rows, escape = header.n, header.streams, header.escape
    in_bounds = rows <= min(n, most_streams(model.config)) and 0 < escape <= TOTAL - 2 * tokenizer.vocab_size
    with suppress(Damaged):  # memory grows with the symbols, and the checks end them with the payload
        if rows and in_bounds and n <= header.length:
            symbols, _ = code(model, tokenizer, Decoder(payload), n=n, rows=rows, escape=escape, **options)
            payload = b"".join(to_bytes(symbols, tokenizer))
    if len(payload) != header.length or hashlib.sha256(payload).digest() != header.sha256:
        raise UserError(
            f"{name} is complete, but this machine computes other probabilities than the one that compressed it. "
            "Decompress it there, with the same PyTorch build and the same environment variables"
        )
    return payload


# -- the command


def others(raw: bytes) -> dict[str, int]:
    """What other compressors make of it, at their best, in bytes."""
    return {
        "xz": len(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)),
        "bzip2": len(bz2.compress(raw, 9)),
        "gzip": len(zlib.compress(raw, 9)) + 12,  # gzip's header and checksum are longer than zlib's
    }


def read_file(source: Path, target: Path) -> bytes:
    """The bytes of source. Raises UserError, before any work, where it or the target will not do."""
    if not file:
        raise UserError("there is no file to compress. Type python compress.py --out_dir=RUN FILE")
    if target == source:
        raise UserError(f"{source} does not end with .mgpt, so the name of the original is not known. Type --to=NAME")
    if target.exists() and not overwrite:
        raise UserError(f"{target} is there already. Replace it: --overwrite; write elsewhere: --to=NAME")
    if not target.parent.is_dir():
        raise UserError(f"there is no folder {target.parent}. Make it, or write elsewhere: --to=NAME")
    try:
        return source.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {source}: {error.strerror}. Name another file") from None


def write_file(target: Path, data: bytes) -> None:
    try:
        with atomic_write(target, len(data)) as output:
            output.write(data)
    except UserError as error:
        raise UserError(str(error).replace("--out_dir=NAME", "--to=NAME")) from None


def main() -> None:
    target = Path(to or (file.removesuffix(".mgpt") if decompress else file + ".mgpt"))
    data = read_file(Path(file), target)
    on_cpu = (auto_kind() if device == "auto" else device) == "cpu"  # where no kernel depends on chance
    machine = init_machine(device, "float32", "false", deterministic=not on_cpu)
    model, tokenizer, _ = load_model(out_dir, ckpt, machine.device, dataset)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"the vocabulary has {tokenizer.vocab_size} tokens, the model in {out_dir} only {model.config.vocab_size}. "
            "Type --dataset=NAME, the dataset it was trained on"
        )
    needs, began = requirements(model, tokenizer, machine), time.perf_counter()
    figures: dict[str, Any] = {}
    with tqdm(disable=not sys.stderr.isatty(), leave=False, unit="token", unit_scale=True) as bar:
        if decompress:
            result = decompress_bytes(file, data, model, tokenizer, needs, progress=bar.update)
        else:
            result, figures = compress_bytes(data, model, tokenizer, needs, streams, progress=bar.update)
    seconds = time.perf_counter() - began
    write_file(target, result)
    size = len(result if decompress else data)
    figures |= {"bytes": size, "seconds": seconds, "bytes_per_second": size / seconds}
    if not decompress:
        figures |= {"mgpt": len(result)} | others(data)
    if json:
        print(dumps(figures))
        return
    print(f"{file}: {len(data):,} bytes -> {target}: {len(result):,} bytes, {figures['bytes_per_second']:,.0f} bytes/s")
    if not decompress and size:
        print_comparison(figures)


def print_comparison(figures: dict[str, Any]) -> None:
    """Prints bits per byte: the file's next to those of other compressors, and where they come from."""
    in_bits = 8 / figures["bytes"]
    names = {"mgpt": "this model", "xz": "xz", "bzip2": "bzip2", "gzip": "gzip"}
    print(
        "bits per byte: "
        + ", ".join(f"{name} {figures[k] * in_bits:.3f} ({figures[k]:,})" for k, name in names.items())
    )
    loss, coder = figures["model_bytes"], figures["coder_bytes"] - figures["model_bytes"]
    if loss:
        print(
            f"the model's loss is {loss * in_bits:.3f} bits per byte. The coder adds {coder / loss:.2%} to it, the "
            f"header {(figures['mgpt'] - figures['coder_bytes']) / loss:.2%}; {figures['streams']} streams"
        )


if __name__ == "__main__":
    config, given = configure(globals(), __file__, positional="file")
    globals().update(config)
    main()
