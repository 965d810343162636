"""Closes the runs that a killed process left open in the run history, so that none stays Running."""

from __future__ import annotations

from uuid import UUID

from prefect import flow

from tasks.ui.history import close_crashed


@flow(name="tidy", flow_run_name="tidy after {flow_run_id}")
def tidy(flow_run_id: UUID) -> None:
    """Close the task runs and sub-flows of a crashed flow run. An automation starts this.

    Args:
        flow_run_id: Id of the flow run that is Crashed.
    """
    close_crashed(flow_run_id)
