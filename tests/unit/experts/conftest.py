"""What the tests of training share: a backbone above a trunk of two layers, and rows."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import backbone_of
from train_fixture import Rows, other_rows, own_rows

from memmcl.backbone.forward import Backbone


@pytest.fixture(scope="module")
def backbone(tiny_base: Path) -> Backbone:
    return backbone_of(tiny_base, 2)


@pytest.fixture(scope="module")
def rows(tiny_base: Path) -> Rows:
    return own_rows(tiny_base)


@pytest.fixture(scope="module")
def anchors(tiny_base: Path) -> Rows:
    return other_rows(tiny_base)
