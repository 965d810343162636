"""What the tests of merges share."""

from __future__ import annotations

from pathlib import Path

import pytest
from merge_fixture import Adapters
from tiny import random_factors


@pytest.fixture(scope="module")
def adapters(tiny_base: Path) -> Adapters:
    """Three experts on different layers and modules, of different ranks and scales."""
    return {
        "low": random_factors(tiny_base, layers=(1, 2, 3), seed=1),
        "high": random_factors(tiny_base, layers=(2, 3), rank=2, alpha=7.0, seed=2),
        "top": random_factors(tiny_base, layers=(3,), modules=("q_proj", "up_proj"), rank=5, seed=3),
    }
