"""The order in which a curriculum meets its subtasks."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from memmcl.errors import ConfigError
from memmcl.seeds import derive

MODES = ("ascending", "descending", "random")


def order_subtasks(difficulties: Mapping[str, float], mode: str = "ascending", seed: int = 0) -> tuple[str, ...]:
    """Return the subtask names of `difficulties` (name -> difficulty) in the order `mode`.

    ascending: the published curriculum, easiest first; descending: hardest first; random: shuffled by `seed`.
    Equal difficulties go by name, so the order of the mapping never matters.

    Raises:
        ConfigError: an unknown mode.
    """
    if mode == "ascending":
        return tuple(sorted(difficulties, key=lambda name: (difficulties[name], name)))
    if mode == "descending":
        return tuple(sorted(difficulties, key=lambda name: (-difficulties[name], name)))
    if mode == "random":
        names = sorted(difficulties)
        shuffled = np.random.default_rng(derive(seed, "curriculum", "order")).permutation(len(names))
        return tuple(names[i] for i in shuffled)
    raise ConfigError(f"unknown curriculum order `{mode}`; choose one of {', '.join(MODES)}")
