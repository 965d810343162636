"""What the tests of the store share."""

from __future__ import annotations

import uuid

import pytest

from memmcl.store import Store


@pytest.fixture
def store() -> Store:
    """An empty store in memory."""
    return Store.open(f"memory://{uuid.uuid4().hex}")
