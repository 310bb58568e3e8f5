"""The file that compress.py writes: what it holds, what it must be decoded with, and how a wrong one is refused.

    magic, version | sha256, length, symbols, escape, streams | requirements | the coder's bytes | CRC-32 of all that

A file may be a stranger's. Its checksum comes first, so that chance damage is found before anything is decoded; its
numbers are compared with bounds before anything of their size is allocated.
"""

import hashlib
import json
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from minutegpt.data.tokenizer import PIECE, Tokenizer
from minutegpt.device import Machine, environment
from minutegpt.errors import UserError
from model import GPT

MAGIC, VERSION, LAYOUT = b"mGPT", 1, struct.Struct("<32sQQIHH")  # the fields of Header, and the requirements' length
REQUIREMENTS = ("model", "tokenizer", "torch", "device", "name", "instructions", "threads", "dtype", "compile")


class Header(NamedTuple):
    sha256: bytes  # of the original
    length: int  # of the original, in bytes
    n: int  # symbols
    escape: int  # the part of the interval that announces a byte
    streams: int  # 0: the original is stored as it is, because the model would not make it smaller


def requirements(model: GPT, tokenizer: Tokenizer, machine: Machine) -> list[str]:
    """What a file must be decoded with: hashes of the model and the tokenizer, and what decides the last bits."""
    digest = hashlib.sha256(repr(model.config).encode())
    for name, weight in model.state_dict().items():
        digest.update(name.encode() + weight.cpu().numpy().tobytes())
    vocabulary = hashlib.sha256(json.dumps(tokenizer.to_json()).encode())
    found = environment(machine) | {"instructions": torch.backends.cpu.get_cpu_capability()}
    found |= {"model": digest.hexdigest()[:12], "tokenizer": vocabulary.hexdigest()[:12]}
    return [" ".join(str(found[name]).split()) for name in REQUIREMENTS]


# -- what is coded: tokens, and single bytes where the vocabulary lacks a character


def to_symbols(raw: bytes, tokenizer: Tokenizer) -> np.ndarray:
    """Any bytes as symbols (n,) int32: below V, the size of the vocabulary, a token; V + b is the byte b."""
    V = tokenizer.vocab_size
    if tokenizer.kind == "char":
        text = raw.decode(errors="surrogateescape")
        pieces = [_characters(text[i : i + PIECE], tokenizer) for i in range(0, len(text), PIECE)]
        symbols = np.concatenate([np.empty(0, np.int32), *pieces])
    else:  # these have a token for every byte
        symbols = tokenizer.encode_bytes(raw).astype(np.int32)
    if b"".join(to_bytes(symbols, tokenizer)) != raw:  # a tokenizer that loses something
        symbols = np.frombuffer(raw, np.uint8) + np.int32(V)
    return symbols


def _characters(text: str, tokenizer: Tokenizer) -> np.ndarray:
    """The id of each character that the vocabulary has, and the UTF-8 bytes of the others, in order."""
    known = np.array([ord(c) for c in tokenizer.tokens], np.uint32)  # type: ignore[arg-type]  # sorted
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")  # (N,)
    ids = np.searchsorted(known, points).clip(max=len(known) - 1)
    lacks = known[ids] != points
    missing = points[lacks].tobytes().decode("utf-32-le", "surrogatepass").encode(errors="surrogateescape")
    sizes = 1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000)  # of its UTF-8
    sizes[~lacks | ((points >= 0xDC80) & (points <= 0xDCFF))] = 1  # a surrogate is a byte that is not UTF-8
    symbols = np.repeat(ids.astype(np.int32), sizes)
    symbols[np.repeat(lacks, sizes)] = np.frombuffer(missing, np.uint8) + np.int32(tokenizer.vocab_size)
    return symbols


def to_bytes(symbols: np.ndarray, tokenizer: Tokenizer) -> Iterator[bytes]:
    """The bytes of symbols (n,), PIECE symbols at once."""
    table = [tokenizer.decode_bytes([i]) for i in range(tokenizer.vocab_size)] + [bytes([b]) for b in range(256)]
    for i in range(0, len(symbols), PIECE):
        yield b"".join([table[symbol] for symbol in symbols[i : i + PIECE].tolist()])


# -- the file


def pack(header: Header, needs: list[str], payload: bytes) -> bytes:
    text = "\n".join(needs).encode()
    data = MAGIC + bytes([VERSION]) + LAYOUT.pack(*header, len(text)) + text + payload
    return data + zlib.crc32(data).to_bytes(4, "little")


def unpack(name: str, data: bytes, needs: list[str]) -> tuple[Header, bytes]:
    """The header and the coder's bytes. Raises UserError for another kind of file, a damaged one, or other needs."""
    if data[:4] != MAGIC or len(data) < 5:
        raise UserError(f"{name} is not a file of compress.py. Leave out --decompress to compress it")
    if data[4] > VERSION:
        raise UserError(
            f"{name} has format {data[4]}, this reads up to {VERSION}. Update this checkout with `git pull`"
        )
    damaged = UserError(f"{name} is damaged or incomplete. Copy it again, or compress the original again")
    if len(data) < 5 + LAYOUT.size + 4 or zlib.crc32(data[:-4]).to_bytes(4, "little") != data[-4:]:
        raise damaged
    *fields, size = LAYOUT.unpack_from(data, 5)
    header, start = Header(*fields), 5 + LAYOUT.size
    wanted, payload = data[start : start + size].decode(errors="replace").split("\n"), data[start + size : -4]
    if len(wanted) != len(REQUIREMENTS) or start + size > len(data) - 4:
        raise damaged
    both = list(zip(REQUIREMENTS, wanted, needs, strict=True))
    different = {key: f"{key} {theirs[:60]!a}, here {ours!a}" for key, theirs, ours in both if theirs != ours}
    if header.streams and different:
        advice = "Decompress it on the machine and with the PyTorch build that compressed it"
        if "model" in different or "tokenizer" in different:
            advice = "Name the run that compressed it: --out_dir=NAME, and --ckpt=best or latest"
        elif {*different} == {"threads"} and wanted[6].isdigit():
            advice = f"Type OMP_NUM_THREADS={wanted[6][:9]} before the command"
        raise UserError(f"{name} needs {'; '.join(different.values())}. {advice}")
    return header, payload
