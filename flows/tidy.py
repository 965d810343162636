"""What a killed process left open in the run history is closed, so that nothing stays Running that does not run."""

from __future__ import annotations

from uuid import UUID

from prefect import flow

from tasks.ui.history import close_crashed


@flow(name="tidy", flow_run_name="tidy after {flow_run_id}")
def tidy(flow_run_id: UUID) -> None:
    """Close the task runs and sub-flows of a crashed flow run. An automation starts this; nobody needs to.

    Args:
        flow_run_id: Id of the flow run that is Crashed.
    """
    close_crashed(flow_run_id)
