"""The trunk's activations of token sequences, each computed once: for all epochs, experts and, on disk, later runs.

A sequence is always run alone, so that its activations never depend on its company, and what was kept equals what
would be computed. The disk holds one safetensors file a sequence below $MEMMCL_CACHE_DIR, written whole or not at all;
what was used longest ago goes first when there is more than $MEMMCL_ACTIVATIONS_GB (default 4; 0 keeps nothing there).
"""

from __future__ import annotations

import hashlib
import os
import time
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memmcl import seeds
from memmcl.backbone.forward import Backbone
from memmcl.backbone.load import BaseRef, cache_directory
from memmcl.errors import ConfigError, shown
from memmcl.files.failures import replace_file

MEMORY_BYTES = 2**30
_FORMAT = 2  # counts up with what the files hold and with how the trunk is computed
_ABANDONED = 3600.0  # seconds after which a file half written is of a process that was killed
_LIMIT = "MEMMCL_ACTIVATIONS_GB"


class Activations:
    """The trunk's outputs of one backbone by token sequence: in memory, and in `directory` if there is one.

    memory_bytes: what may be held in memory; those used longest ago are dropped.
    """

    def __init__(self, backbone: Backbone, directory: Path | None = None, *, memory_bytes: int = MEMORY_BYTES) -> None:
        self._backbone = backbone
        self._directory = directory
        self._memory_bytes = memory_bytes
        self._width = int(backbone.model.config.hidden_size)
        self._held = 0
        self._kept: OrderedDict[tuple[int, ...], Tensor] = OrderedDict()
        self.computed = 0
        """How many sequences were run, found neither in memory nor on disk."""

    def of(self, tokens: Sequence[int]) -> Tensor:
        """Return the trunk's activations of one sequence, (length, d) in the backbone's dtype; not to be changed."""
        key = tuple(tokens)
        if not key:
            return torch.empty(0, self._width, dtype=self._backbone.dtype, device=self._backbone.device)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        hidden = self._read(key)
        if hidden is None:
            hidden = self._backbone.sequence_hidden(key)
            self.computed += 1
            self._write(key, hidden)
        self._kept[key] = hidden
        self._held += hidden.nbytes
        while self._held > self._memory_bytes and len(self._kept) > 1:
            _, dropped = self._kept.popitem(last=False)
            self._held -= dropped.nbytes
        return hidden

    def _read(self, key: tuple[int, ...]) -> Tensor | None:
        from safetensors import SafetensorError
        from safetensors.torch import load

        if self._directory is None:
            return None
        path = self._path(key)
        try:
            found = load(path.read_bytes())
            hidden, checksum = found["hidden"], int(found["crc32"])
        except (OSError, SafetensorError, KeyError, ValueError, RuntimeError):
            return None
        if checksum != _checksum(hidden):  # a disk that lost power, or rotted
            return None
        with suppress(OSError):  # others' files can be read all the same
            os.utime(path)  # used now: it is not the next to go
        expected = (len(key), self._width)
        return hidden.to(self._backbone.device) if tuple(hidden.shape) == expected else None

    def _write(self, key: tuple[int, ...], hidden: Tensor) -> None:
        from safetensors.torch import save

        if self._directory is None:
            return
        path = self._path(key)
        with suppress(OSError):  # a full or read-only disk costs time, never a result
            whole = hidden.cpu().contiguous()
            replace_file(path, save({"hidden": whole, "crc32": torch.tensor(_checksum(whole))}))

    def _path(self, key: tuple[int, ...]) -> Path:
        assert self._directory is not None
        name = hashlib.sha256(np.array(key, dtype="<i8").tobytes()).hexdigest()
        return self._directory / name[:2] / f"{name}.safetensors"


def _checksum(hidden: Tensor) -> int:
    return zlib.crc32(hidden.view(torch.uint8).numpy().data)


def activations_directory(base: BaseRef, backbone: Backbone) -> Path | None:
    """Return where the activations of this base on this kind of hardware are kept; None where nothing shall be.

    Everything that may change a bit of them is in its name: weights, dtype, split, device, threads, torch's build,
    transformers' version.

    Raises:
        ConfigError: MEMMCL_ACTIVATIONS_GB is no number.
    """
    import transformers

    if disk_limit() <= 0:
        return None
    device = backbone.device
    decided_by: Mapping[str, Any] = {
        "base": base.digest,
        "dtype": str(backbone.dtype),
        "split": backbone.split,
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "format": _FORMAT,
    }
    return cache_directory() / "activations" / seeds.digest(decided_by)[:16]


def disk_limit() -> int:
    """Return how many bytes of activations may lie on disk.

    Raises:
        ConfigError: MEMMCL_ACTIVATIONS_GB is no number.
    """
    given = os.environ.get(_LIMIT, "4")
    try:
        return int(float(given) * 2**30)
    except (ValueError, OverflowError) as error:  # OverflowError: an infinity
        raise ConfigError(
            f"{_LIMIT} must be a number of GiB, got {shown(given)}; 0 keeps no activations on disk"
        ) from error


def prune_activations(limit: int | None = None) -> int:
    """Remove the activations that were used longest ago until at most `limit` bytes are left; return what was removed.

    Several processes may do so at once: a file that another one removed first is no error.
    """
    limit = disk_limit() if limit is None else limit
    found: list[tuple[float, int, Path]] = []
    for path in (cache_directory() / "activations").glob("*/*/*"):
        with suppress(OSError):
            stat = path.stat()
            if path.suffix == ".safetensors":
                found.append((stat.st_mtime, stat.st_size, path))
            elif path.suffix == ".part" and time.time() - stat.st_mtime > _ABANDONED:
                path.unlink()
    total, removed = sum(size for _, size, _ in found), 0
    for _, size, path in sorted(found):
        if total - removed <= limit:
            break
        with suppress(OSError):
            path.unlink()
        removed += size
    return removed
