"""Reads a file of torch.save as if a stranger had written it: nothing in it can run, reach out, or fill memory.

Before a byte is believed, the zip's checksums are verified and its pickle is held to the few opcodes and names that
torch.save writes. Then it is loaded with weights_only=True out of a memory map, whose storages cannot grow: a tensor
that claims more than its own bytes is an error, and no claim allocates anything. What comes out is copied into
tensors and plain values within bounds.
"""

import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from pickletools import genops
from typing import IO, Any

import torch
from torch import Tensor

# bounds far above any real checkpoint, and far below what hurts
MOST_VALUES = 4_000_000  # plain values, each character of a text counted
LARGEST_PICKLE = 2**24  # bytes; a tokenizer of 50,000 merges takes one million
MEMBER = re.compile(r"[^/]+/(data\.pkl|byteorder|version|\.format_version|\.storage_alignment|data/\d+|\.data/\w+)")
STORAGE = re.compile(r"torch (Float|Double|Half|BFloat16|Long|Int|Short|Char|Byte|Bool)Storage")
GLOBALS = ("collections OrderedDict", "torch._utils _rebuild_tensor_v2")
OPCODE = re.compile(
    "PROTO|STOP|MARK|GLOBAL|REDUCE|BUILD|BINPERSID|(LONG_)?BIN(PUT|GET)|NONE|NEWTRUE|NEWFALSE|BININT[12]?|LONG1|"
    "BINFLOAT|BINUNICODE|EMPTY_(DICT|LIST|TUPLE)|SETITEMS?|APPENDS?|TUPLE[123]?"
)


def safe_load(path: str | Path) -> dict[str, Any]:
    """The dict that torch.save wrote, on the CPU. Raises an exception of any kind for a file that is no good."""
    with open(path, "rb") as file:
        most = 2 * check_archive(file)  # bytes of all tensors. twice what is stored: tied weights share theirs

    def take(tensor: Tensor) -> Tensor:
        nonlocal most
        most -= tensor.numel() * tensor.element_size()
        if most < 0:  # a view of a few bytes can claim any size, and one storage can be seen many times
            raise ValueError("its tensors claim to be more than the file holds")
        return tensor.clone(memory_format=torch.contiguous_format)  # off the map, which Windows would lock

    return plain(torch.load(str(path), map_location="cpu", mmap=True, weights_only=True), take)


def check_archive(file: IO[bytes]) -> int:
    """Verifies the zip, and what its pickle asks for without running it; the bytes stored. Raises ValueError."""
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        names = [member.filename for member in members]
        stored = sum(member.file_size for member in members)
        if any(member.compress_type or member.file_size != member.compress_size for member in members):
            raise ValueError("it is compressed, which torch.save never does")
        if len(set(names)) < len(names) or stored > file.seek(0, 2) or archive.comment:
            raise ValueError("its parts overlap")
        if not all(MEMBER.fullmatch(name) for name in names) or len({name.split("/")[0] for name in names}) != 1:
            raise ValueError("it holds parts that torch.save never writes")
        if broken := archive.testzip():
            raise ValueError(f"the checksum of its part {broken} is wrong")
        pickle = names[0].split("/")[0] + "/data.pkl"
        if archive.getinfo(pickle).file_size > LARGEST_PICKLE:
            raise ValueError("its pickle is larger than any checkpoint needs")
        pickled = archive.read(pickle)
    for opcode, argument, _ in genops(pickled):
        if not OPCODE.fullmatch(opcode.name):
            raise ValueError(f"its pickle uses {opcode.name}, which torch.save never does")
        name = str(argument)
        if opcode.name == "GLOBAL" and name not in GLOBALS and not STORAGE.fullmatch(name):
            raise ValueError(f"it asks to load {name.replace(' ', '.')}, which no checkpoint needs")
    return stored


def plain(root: Any, tensors: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """A copy in dicts, lists, tuples, numbers, texts, and what `tensors` makes of each tensor.

    Raises ValueError for anything else, and for too much of it: what is shared counts each time that it is seen, so
    that a few bytes cannot unfold into gigabytes.
    """
    left = MOST_VALUES

    def copy(value: Any, depth: int) -> Any:
        nonlocal left
        left -= 1 + (len(value) if isinstance(value, str) else 0)
        if left < 0 or depth > 20:
            raise ValueError("it holds too many values, or too deep ones")
        if type(value) is Tensor:
            return tensors(value)
        if isinstance(value, dict) and all(type(key) in (str, int) for key in value):
            return {copy(key, depth + 1): copy(item, depth + 1) for key, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)(copy(item, depth + 1) for item in value)
        if value is None or (isinstance(value, int) and -(2**63) <= value < 2**63):
            return value
        for kind in (float, str):
            if isinstance(value, kind):
                return kind(value)  # torch.__version__ calls itself a str
        raise ValueError(f"it holds a {type(value).__name__}, which is no tensor and no plain value")

    if not isinstance(root, dict):
        raise ValueError("it holds no state of a run")
    return copy(root, 0)
