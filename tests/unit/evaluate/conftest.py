"""What the tests of evaluation share: the tiny base run by transformers alone, and its prompter."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import plain_model, prompter_of
from torch import nn

from memmcl.suite.prompts import Prompter


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> nn.Module:
    """The oracle: the same weights, run by transformers alone."""
    return plain_model(tiny_base)


@pytest.fixture(scope="module")
def prompter(tiny_base: Path) -> Prompter:
    return prompter_of(tiny_base)
