"""Cancelling in the Prefect UI: the work on Ray ends, the history says Cancelled throughout, the run goes on later."""

from __future__ import annotations

from pathlib import Path
from uuid import UUID

import pytest
from e2e_driver import FEW, desk, states
from prefect.client.orchestration import SyncPrefectClient
from prefect.states import Cancelling

from memmcl.store import Store

pytestmark = [pytest.mark.campaign, pytest.mark.timeout(1800)]


def _flow_run(client: SyncPrefectClient) -> UUID:
    (found,) = [run.id for run in client.read_flow_runs() if run.parent_task_run_id is None]
    return found


@pytest.mark.parametrize("stage", ["training", "search"])
def test_a_cancelled_run_ends_and_the_same_command_goes_on(stage: str, tmp_path: Path, tiny_base: Path) -> None:
    """Nobody supervises `memmcl run`: it has to notice by itself, while it waits inside Ray or Tune."""
    longer = {"training": "experts.steps=3000", "search": "search.stage1_evaluations=60"}[stage]
    begun = {"training": "warm start", "search": "stage 1"}[stage]
    with desk(tmp_path, tiny_base) as place:
        with place.started("run", place.config, *FEW, "--set", longer) as running:
            said = running.output / "out"
            running.wait_until(lambda: "Prefect UI: " in said.read_text(), "the server is up")
            api = said.read_text().split("Prefect UI: ")[1].split()[0] + "/api"
            running.wait_until(
                lambda: any(n.startswith(begun) and s == "Running" for n, s in states(place.history, "task_run")),
                f"{stage} has begun",
            )
            with SyncPrefectClient(api) as client:
                client.set_flow_run_state(_flow_run(client), Cancelling())
            ended = running.ended()
            running.wait_until(lambda: not running.members(), "its processes have ended")
        assert ended.code == 130, ended
        assert ended.out.splitlines()[-1] == "the run was cancelled"
        assert ended.err.splitlines()[-1] == "error: interrupted; run the same command again to go on"
        assert "Traceback" not in ended.err
        for table in ("flow_run", "task_run"):
            found = {state for _, state in states(place.history, table)}
            assert "Cancelled" in found
            assert found <= {"Cancelled", "Completed", "Reused"}, states(place.history, table)
        store = Store.open(str(place.cwd / "memmcl-store"))
        assert not store.objects.sizes("pointers/leases"), "the lease is free"
        if stage == "search":
            trained = {one.key: one.created for one in store.list("expert")}
            assert len(trained) == 2
            again = place.run("run", place.config, *FEW, "--set", longer)
            assert again.code == 0, again
            assert {one.key: one.created for one in store.list("expert")} == trained
