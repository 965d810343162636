"""The header of a GGUF file, read and checked against the file before a library builds anything from it.

The format: magic, version, counts, then pairs of key and value, then name, shape, type and place of each tensor.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memmcl.backbone.model_config import EXPERTS, LAYERS
from memmcl.backbone.tensors import NAME, TENSORS
from memmcl.errors import shown

PAIRS = 4_096  # pairs of key and value in a GGUF file, at most
ITEMS = 2_000_000
"""Items of all lists in those values, at most: tokens, their scores and types, the tokenizer's merges."""
STRING_BYTES = 1 << 24  # bytes of one text, at most; the chat template is one

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _LIST = 8, 9
_DIMENSIONS = 4


@dataclass(frozen=True)
class GgufHeader:
    """values: single values by key, lists left out; tensors: how many; elements: how many numbers they hold in all."""

    values: dict[str, Any]
    tensors: int
    elements: int


def read_gguf_header(path: Path) -> GgufHeader:
    """Read and check the header of a GGUF file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not a header, is cut off, or does not fit the file.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            header = _Reader(data).header()
        except struct.error as error:
            raise ValueError("it is cut off") from error
    limits = {".block_count": min(LAYERS, header.tensors), ".expert_count": EXPERTS}
    for key, value in header.values.items():
        limit = limits.get(key[key.rfind(".") :])
        if limit is not None and (type(value) is not int or not 0 <= value <= limit):
            raise ValueError(f"{shown(key)} is {shown(value)}, and the file holds {header.tensors:,} tensors")
    return header


class _Reader:
    """Reads the bytes of a file in order; beyond its end it raises `struct.error`."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 0
        self._items = 0

    def header(self) -> GgufHeader:
        if self._data[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        self._at = 4
        version, tensors, pairs = self._take("IQQ")
        if version not in (2, 3):
            raise ValueError(f"expected version 2 or 3 of the format, in little-endian order, got {version}")
        for what, count, most in (("tensors", tensors, TENSORS), ("pairs of key and value", pairs, PAIRS)):
            if count > most:
                raise ValueError(f"it says that it has {count:,} {what}, and memmcl reads {most:,} at most")
        values = {}
        for _ in range(pairs):
            key = self._string()
            value = self._value(self._take("I")[0], key)
            if value is not None:
                values[key] = value
        sizes = [self._tensor() for _ in range(tensors)]
        taken = sum(size for _, size in sizes)
        if taken > len(self._data):  # or several tensors overlap
            raise ValueError(f"its tensors take {taken:,} bytes, and it has {len(self._data):,}; it is cut off")
        alignment = values.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"expected a power of two as general.alignment, got {shown(alignment)}")
        return GgufHeader(values, tensors, sum(elements for elements, _ in sizes))

    def _take(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{form}", self._data, self._at)
        self._at += struct.calcsize(f"<{form}")
        return values

    def _skip(self, length: int) -> None:
        if length > len(self._data) - self._at:
            raise struct.error
        self._at += length

    def _string(self) -> str:
        (length,) = self._take("Q")
        if length > STRING_BYTES:
            raise ValueError(f"it has a text of {length:,} bytes, more than {STRING_BYTES:,}")
        self._skip(length)
        return self._data[self._at - length : self._at].decode(errors="replace")

    def _value(self, kind: int, key: str) -> Any:
        """Return a value, or None for a list, whose items are only counted."""
        if kind in _SCALARS:
            return self._take(_SCALARS[kind])[0]
        if kind == _STRING:
            return self._string()
        if kind != _LIST:
            raise ValueError(f"{shown(key)} is of the unknown type {kind}")
        kind, count = self._take("IQ")
        self._items += count
        if self._items > ITEMS:
            raise ValueError(f"its lists have more than {ITEMS:,} items")
        if kind in _SCALARS:
            self._skip(count * struct.calcsize(f"<{_SCALARS[kind]}"))
        elif kind == _STRING:
            for _ in range(count):
                self._skip(self._take("Q")[0])
        else:
            raise ValueError(f"{shown(key)} is a list of the unknown type {kind}")
        return None

    def _tensor(self) -> tuple[int, int]:
        """Return how many numbers a tensor holds, and how many bytes it takes."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        name = self._string()
        (dimensions,) = self._take("I")
        if len(name) > NAME or not 1 <= dimensions <= _DIMENSIONS:
            raise ValueError(f"the tensor {shown(name)} has {dimensions} dimensions, or too long a name")
        elements = math.prod(self._take("Q" * dimensions))
        kind, start = self._take("IQ")
        try:
            block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except (ValueError, KeyError) as error:
            raise ValueError(f"the tensor {shown(name)} is of the unknown type {kind}") from error
        taken = elements // block * size
        if not elements or elements % block or start + taken > len(self._data):
            raise ValueError(f"the tensor {shown(name)} does not lie in the file; it is cut off, or damaged")
        return elements, taken
