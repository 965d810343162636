"""Which texts repeat a test text, or share a window of 36 normalised characters with one.

Every window is one 64-bit number, so that millions of them are compared in seconds and the answer is the same in
every process. Two different windows have the same number with a chance of about 1 in 10^19.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

WINDOW = 36  # characters of normalised text that two texts must have in common, in one piece, to overlap

Hashes = NDArray[np.uint64]

_BASE = 0x9E3779B97F4A7C15  # odd, so that its powers have inverses modulo 2^64
_BATCH = 1 << 20  # characters hashed at once
_BUCKET_BITS = 24
_BUCKET_SHIFT = np.uint64(64 - _BUCKET_BITS)


@dataclass(frozen=True)
class Blocklist:
    """The contents of many texts, and all their windows: hashes (windows,) uint64, sorted, each once."""

    contents: frozenset[str]
    hashes: Hashes
    buckets: NDArray[np.bool_]

    @classmethod
    def of(cls, contents: Iterable[str]) -> Blocklist:
        """Return the block list of these normalised texts."""
        distinct = frozenset(contents)
        windows = [hashes for hashes, _ in _windows(list(distinct))]
        hashes = np.unique(np.concatenate([np.empty(0, np.uint64), *windows]))
        buckets = np.zeros(1 << _BUCKET_BITS, dtype=np.bool_)
        buckets[hashes >> _BUCKET_SHIFT] = True
        return cls(distinct, hashes, buckets)

    def equal(self, contents: Sequence[str]) -> NDArray[np.bool_]:
        """Return, for each normalised text, whether it is one of the block list's: (texts,) bool."""
        return np.fromiter((content in self.contents for content in contents), dtype=np.bool_, count=len(contents))

    def sharing(self, contents: Sequence[str]) -> NDArray[np.bool_]:
        """Return, for each normalised text, whether a window of it is one of the block list's: (texts,) bool."""
        shares = np.zeros(len(contents), dtype=np.bool_)
        if len(self.hashes):
            for hashes, rows in _windows(contents):
                likely = np.flatnonzero(self.buckets[hashes >> _BUCKET_SHIFT])  # spares most of the search below
                wanted = hashes[likely]
                nearest = np.minimum(np.searchsorted(self.hashes, wanted), len(self.hashes) - 1)
                shares[rows[likely[self.hashes[nearest] == wanted]]] = True
        return shares

    def overlapping(self, contents: Sequence[str]) -> NDArray[np.bool_]:
        """Return, for each normalised text, whether it equals one of the block list's or shares a window: (texts,)."""
        return self.equal(contents) | self.sharing(contents)


def _windows(contents: Sequence[str]) -> Iterator[tuple[Hashes, NDArray[np.int64]]]:
    """Yield batches of window hashes, and the number of the text that each window is from: (windows,) both.

    Within a batch, hash = sum over i < WINDOW of code point i * BASE^i, modulo 2^64: a difference of two running sums,
    divided by the power of BASE at which the window starts.
    """
    for first, batch in _batches(contents):
        codes = np.frombuffer("".join(batch).encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        lengths = np.fromiter(map(len, batch), dtype=np.int64, count=len(batch))
        if len(codes) < WINDOW:
            continue
        sums = np.zeros(len(codes) + 1, dtype=np.uint64)
        np.cumsum(codes * _powers(_BASE, len(codes)), out=sums[1:])
        hashes = (sums[WINDOW:] - sums[:-WINDOW]) * _powers(pow(_BASE, -1, 1 << 64), len(codes))[: 1 - WINDOW]
        rows = np.repeat(np.arange(len(batch)), lengths)[: len(hashes)]
        whole = np.arange(len(hashes)) + WINDOW <= np.cumsum(lengths)[rows]  # not over the end of the text
        yield hashes[whole], rows[whole] + first


def _batches(contents: Sequence[str]) -> Iterator[tuple[int, Sequence[str]]]:
    """Yield runs of texts of about `_BATCH` characters together, with the number of the first."""
    first = size = 0
    for number, content in enumerate(contents):
        size += len(content)
        if size >= _BATCH or number + 1 == len(contents):
            yield first, contents[first : number + 1]
            first, size = number + 1, 0


def _powers(base: int, count: int) -> Hashes:
    """Return base^0, base^1, ... modulo 2^64: (count,) uint64."""
    powers = np.full(count, base, dtype=np.uint64)
    powers[:1] = 1
    return np.cumprod(powers, dtype=np.uint64)
