"""The history of the servers that commands start: it forgets what ended long ago, and nothing else."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from e2e_driver import wait_until
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient

from flows import server
from flows.server import prefect_server, server_environment

LONG_AGO = "2020-01-01 00:00:00.000000"


@flow
def hello() -> int:
    return 1


def test_what_the_user_set_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    (name, value), *_ = server._FORGETFUL.items()
    monkeypatch.delenv(name, raising=False)
    assert server_environment(1)[name] == value
    monkeypatch.setenv(name, "events")
    assert server_environment(1)[name] == "events"


@pytest.mark.campaign
def test_old_runs_and_events_are_forgotten_at_the_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))

    def count(table: str, where: str = "true") -> int:
        with closing(sqlite3.connect(f"file:{tmp_path / 'prefect.db'}?mode=ro", uri=True)) as history:
            return int(history.execute(f"select count(*) from {table} where {where}").fetchone()[0])

    with prefect_server() as api:
        hello()
        hello()
        with SyncPrefectClient(api) as client:
            old, new = (run.id for run in client.read_flow_runs())
        wait_until(lambda: count("events") > 0, "events are recorded")
    with closing(sqlite3.connect(tmp_path / "prefect.db")) as history:
        history.execute("update flow_run set end_time = ? where id = ?", (LONG_AGO, str(old)))
        history.execute("update events set occurred = ?", (LONG_AGO,))
        history.execute("update event_resources set occurred = ?", (LONG_AGO,))
        history.commit()
    with prefect_server() as api:
        wait_until(lambda: count("events", f"occurred = '{LONG_AGO}'") == 0, "old events are gone")
        wait_until(lambda: count("flow_run") == 1, "the old run is gone")
        with SyncPrefectClient(api) as client:
            assert [run.id for run in client.read_flow_runs()] == [new]
