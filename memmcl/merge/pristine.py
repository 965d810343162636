"""The base's weights as they were before any merge, without a second copy of them in memory where that can be had.

On a CPU the weights that adapters change are read again from the base's own safetensors files, one module at a time:
the files lie in the page cache, which all workers of a machine share and the system takes back when it needs memory.
Each is compared with the resident weight first; what the files do not hold bit for bit, and all of it on a GPU, is
copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from memmcl.errors import ModelError


class Pristine:
    """Weights (d_out, d_in) by module, as they are now in `weights`; `directory` holds the base's files, if any do."""

    def __init__(self, weights: Mapping[str, Tensor], directory: Path) -> None:
        self._files: dict[str, Path] = {}
        self._copies: dict[str, Tensor] = {}
        self._dtypes = {module: weight.dtype for module, weight in weights.items()}
        held = _files_of(directory)
        self._states = {path: _state(path) for path in set(held.values())}
        for module, weight in weights.items():
            path = held.get(f"{module}.weight")
            if path is not None and weight.device.type == "cpu" and torch.equal(self._read(module, path), weight):
                self._files[module] = path
            else:
                self._copies[module] = weight.detach().clone()

    def __getitem__(self, module: str) -> Tensor:
        """Return one module's weight; nobody may change it in place.

        Raises:
            ModelError: the base's files are gone, or not those that were loaded.
        """
        if module in self._copies:
            return self._copies[module]
        path = self._files[module]
        try:
            if _state(path) == self._states[path]:
                return self._read(module, path)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"the base's file {path} cannot be read any more: {error}") from error
        raise ModelError(f"the base's file {path} was changed while it was in use; start again")

    def _read(self, module: str, path: Path) -> Tensor:
        with safe_open(path, framework="pt") as file:
            # The tensor lies in the mapped file, and is unmapped with it.
            found: Tensor = file.get_tensor(f"{module}.weight")
            return found.to(self._dtypes[module])


def _files_of(directory: Path) -> dict[str, Path]:
    """Return, by the name of a tensor, the file that holds it."""
    held: dict[str, Path] = {}
    for path in sorted(directory.glob("*.safetensors")) if directory.is_dir() else []:
        try:
            with safe_open(path, framework="pt") as file:
                held |= dict.fromkeys(file.keys(), path)
        except (OSError, SafetensorError):  # not one of the base's: what is not found is copied
            continue
    return held


def _state(path: Path) -> tuple[int, ...]:
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns
