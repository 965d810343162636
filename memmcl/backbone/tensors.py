"""The header of a safetensors file, read and checked before any of its tensors."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from memmcl.errors import shown
from memmcl.files.untrusted import parse_json

HEADER_BYTES = 1 << 24  # bytes of the header of a safetensors file, at most
TENSORS = 100_000  # tensors in one safetensors file, at most
NAME = 200  # characters of a tensor's name, at most


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: its type as safetensors calls it (F32, BF16, ...), and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """raw: the bytes up to the first tensor; size: bytes of the whole file; tensors: by name."""

    raw: bytes
    size: int
    tensors: Mapping[str, TensorInfo]


def read_header(file: BinaryIO) -> Header:
    """Read the header of an open file, from its beginning, and no further.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not a header, exceeds the bounds above, or does not fit the file's size.
    """
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > HEADER_BYTES:
        raise ValueError(f"it does not begin with a safetensors header of at most {HEADER_BYTES:,} bytes")
    text = file.read(length)
    if len(text) < length:
        raise ValueError("it ends within its header")
    try:
        fields = parse_json(text, HEADER_BYTES)
    except ValueError as error:
        raise ValueError(f"its header cannot be read: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError("its header is no JSON object")
    fields.pop("__metadata__", None)
    if len(fields) > TENSORS:
        raise ValueError(f"it holds {len(fields):,} tensors, and memmcl reads {TENSORS:,} at most")
    tensors = {name: _tensor(name, entry) for name, entry in fields.items()}
    size = 8 + length + max((end for _, end in tensors.values()), default=0)
    if file.seekable():
        actual = file.seek(0, os.SEEK_END)
        file.seek(8 + length)
        if actual != size:
            raise ValueError(f"its header describes {size:,} bytes, and it has {actual:,}; it is cut off, or damaged")
    return Header(start + text, size, {name: info for name, (info, _) in tensors.items()})


def _tensor(name: str, entry: Any) -> tuple[TensorInfo, int]:
    """Return the header's entry of one tensor, and the offset of its end."""
    if len(name) > NAME:
        raise ValueError(f"it holds a tensor with a name of {len(name):,} characters, more than {NAME}")
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    valid = isinstance(dtype, str) and _sizes(shape) and _sizes(offsets) and len(offsets) == 2
    if not valid or offsets[0] > offsets[1]:
        raise ValueError(f"its header has no type, shape and place for the tensor {shown(name)}")
    return TensorInfo(dtype, tuple(shape)), offsets[1]


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)
