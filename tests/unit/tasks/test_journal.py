"""Finding the journal of a run among those of a store."""

from __future__ import annotations

from pathlib import Path

import pytest

from memmcl.errors import DataError
from memmcl.store import Store
from tasks.run.journal import read_journal


def test_a_folder_that_a_removed_run_left_is_no_run(tmp_path: Path) -> None:
    """An S3 server may go on naming folders whose objects are gone."""
    store = Store.open(str(tmp_path / "store"))
    store.append("runs/ab12", 0, {"config": {}, "started": "2026-01-01T00:00:00+00:00"})
    (tmp_path / "store" / "logs" / "runs" / "ab34").mkdir()
    assert read_journal(store, "ab").run_id == "ab12"
    with pytest.raises(DataError, match="no run 'ab34' was started"):
        read_journal(store, "ab34")
