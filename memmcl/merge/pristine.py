"""The base's weights as they were before any merge, without a second copy of them in memory where that can be had.

On a CPU the weights that adapters change are read again from the base's own safetensors files, one module at a time:
the files lie in the page cache, which all workers of a machine share and the system takes back when it needs memory.
Weights that differ in the files, and all weights on a GPU, are copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from memmcl.errors import ModelError

WINDOW = 2**28
"""bytes read before a file is mapped anew: pages that were read count as this process's memory until then"""


class Pristine:
    """Weights (d_out, d_in) by module, as they are now in `weights`; `directory` holds the base's files, if any do."""

    def __init__(self, weights: Mapping[str, Tensor], directory: Path) -> None:
        held = _files_of(directory)
        self._states = {path: _state(path) for path in set(held.values())}
        self._dtypes = {module: weight.dtype for module, weight in weights.items()}
        self._files = {
            module: held[f"{module}.weight"]
            for module, weight in weights.items()
            if f"{module}.weight" in held and weight.device.type == "cpu"
        }
        same = {module for module, weight in self._read(self._files) if torch.equal(weight, weights[module])}
        self._copies = {module: weight.detach().clone() for module, weight in weights.items() if module not in same}

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each module and its weight; callers must neither change nor keep it.

        Raises:
            ModelError: the base's files are gone, or not those that were loaded.
        """
        yield from self._copies.items()
        yield from self._read([module for module in self._files if module not in self._copies])

    def _read(self, modules: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights that files hold; a file is mapped for WINDOW bytes at a time."""
        handle: Any = None
        opened, left = Path(), 0
        for module in modules:
            path = self._files[module]
            if path != opened or left <= 0:
                opened, handle, left = path, self._open(path), WINDOW
            tensor: Tensor = handle.get_tensor(f"{module}.weight")
            left -= tensor.nbytes
            yield module, tensor.to(self._dtypes[module])

    def _open(self, path: Path) -> Any:
        try:
            if _state(path) == self._states[path]:
                return safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise ModelError(f"the base's file {path} cannot be read any more: {error}") from error
        raise ModelError(f"the base's file {path} was changed while it was in use; start again")


def _files_of(directory: Path) -> dict[str, Path]:
    """Return, by the name of a tensor, the file that holds it."""
    held: dict[str, Path] = {}
    for path in sorted(directory.glob("*.safetensors")) if directory.is_dir() else []:
        try:
            with safe_open(path, framework="pt") as file:
                held |= dict.fromkeys(file.keys(), path)
        except (OSError, SafetensorError):  # not one of the base's: its weights are copied
            continue
    return held


def _state(path: Path) -> tuple[int, ...]:
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns
