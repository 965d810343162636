"""The trunk's activations of token sequences, each computed once: for all epochs, experts and, on disk, later runs.

A sequence is always run alone, so that its activations never depend on a batch, and cached ones equal computed ones.
On disk there is one safetensors file a sequence below $MEMMCL_CACHE_DIR, written atomically; the least recently used
are removed beyond $MEMMCL_ACTIVATIONS_GB (default 4; 0 keeps nothing on disk).
"""

from __future__ import annotations

import hashlib
import os
import time
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from memmcl import seeds
from memmcl.backbone.forward import Backbone
from memmcl.backbone.load import BaseRef, cache_directory
from memmcl.errors import ConfigError, shown
from memmcl.files.failures import replace_file

MEMORY_BYTES = 2**30
_FORMAT = 2  # counts up when the files' content changes, or how the trunk is computed
_ABANDONED = 3600.0  # seconds; an older unfinished file was left by a killed process
_LIMIT = "MEMMCL_ACTIVATIONS_GB"


class Activations:
    """The trunk's outputs of one backbone by token sequence: in memory, and in `directory` if there is one.

    memory_bytes: the size of the cache in memory; the least recently used are dropped.
    """

    def __init__(self, backbone: Backbone, directory: Path | None = None, *, memory_bytes: int = MEMORY_BYTES) -> None:
        self._backbone = backbone
        self._directory = directory
        self._memory_bytes = memory_bytes
        self._width = int(backbone.model.config.hidden_size)
        self._bytes = 0
        self._cache: OrderedDict[tuple[int, ...], Tensor] = OrderedDict()
        self.computed = 0
        """How many sequences were run because neither memory nor disk had them."""

    def of(self, tokens: Sequence[int]) -> Tensor:
        """Return the trunk's activations of one sequence, (length, d) in the backbone's dtype; not to be changed."""
        key = tuple(tokens)
        if not key:
            return torch.empty(0, self._width, dtype=self._backbone.dtype, device=self._backbone.device)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        hidden = self._read(key)
        if hidden is None:
            hidden = self._backbone.sequence_hidden(key)
            self.computed += 1
            self._write(key, hidden)
        self._cache[key] = hidden
        self._bytes += hidden.nbytes
        while self._bytes > self._memory_bytes and len(self._cache) > 1:
            _, dropped = self._cache.popitem(last=False)
            self._bytes -= dropped.nbytes
        return hidden

    def _read(self, key: tuple[int, ...]) -> Tensor | None:
        if self._directory is None:
            return None
        path = self._path(self._directory, key)
        try:
            tensors = load(path.read_bytes())
            hidden, checksum = tensors["hidden"], int(tensors["crc32"])
        except (OSError, SafetensorError, KeyError, ValueError, RuntimeError):
            return None
        if checksum != _checksum(hidden):  # a disk that lost power, or rotted
            return None
        with suppress(OSError):  # a file of another user can be read all the same
            os.utime(path)  # now the most recently used
        return hidden.to(self._backbone.device) if hidden.shape == (len(key), self._width) else None

    def _write(self, key: tuple[int, ...], hidden: Tensor) -> None:
        if self._directory is None:
            return
        with suppress(OSError):  # a full or read-only disk costs time, never a result
            whole = hidden.cpu().contiguous()
            content = save({"hidden": whole, "crc32": torch.tensor(_checksum(whole))})
            replace_file(self._path(self._directory, key), content)

    @staticmethod
    def _path(directory: Path, key: tuple[int, ...]) -> Path:
        name = hashlib.sha256(np.array(key, dtype="<i8").tobytes()).hexdigest()
        return directory / name[:2] / f"{name}.safetensors"


def _checksum(hidden: Tensor) -> int:
    return zlib.crc32(hidden.view(torch.uint8).numpy().data)


def activations_directory(base: BaseRef, backbone: Backbone) -> Path | None:
    """Return the cache directory for this base on this kind of hardware; None where the disk cache is off.

    Its name depends on everything that may change a bit of the activations: weights, dtype, split, device, threads,
    versions of torch and transformers.

    Raises:
        ConfigError: MEMMCL_ACTIVATIONS_GB is no number.
    """
    import transformers

    if disk_limit() <= 0:
        return None
    cpu = torch.backends.cpu.get_cpu_capability()
    decided_by = {
        "base": base.digest,
        "dtype": str(backbone.dtype),
        "split": backbone.split,
        "device": torch.cuda.get_device_name(backbone.device) if backbone.device.type == "cuda" else cpu,
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
    limit = os.environ.get(_LIMIT, "4")
    try:
        return int(float(limit) * 2**30)
    except (ValueError, OverflowError) as error:  # OverflowError: an infinity
        raise ConfigError(
            f"{_LIMIT} must be a number of GiB, got {shown(limit)}; 0 keeps no activations on disk"
        ) from error


def prune_activations(limit: int | None = None) -> int:
    """Remove the least recently used activations until at most `limit` bytes are left; return the bytes removed.

    Several processes may do so at once: a file that another one removed first is no error.
    """
    limit = disk_limit() if limit is None else limit
    files: list[tuple[float, int, Path]] = []
    for path in (cache_directory() / "activations").glob("*/*/*"):
        with suppress(OSError):
            stat = path.stat()
            if path.suffix == ".safetensors":
                files.append((stat.st_mtime, stat.st_size, path))
            elif path.suffix == ".part" and time.time() - stat.st_mtime > _ABANDONED:
                path.unlink()
    total, removed = sum(size for _, size, _ in files), 0
    for _, size, path in sorted(files):
        if total - removed <= limit:
            break
        with suppress(OSError):
            path.unlink(missing_ok=True)
            removed += size
    return removed
