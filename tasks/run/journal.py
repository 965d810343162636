"""What a run writes down as it goes, so that it can be looked at before it is finished, and resumed by its id."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from memmcl.errors import DataError, shown
from memmcl.store import ArtifactRef, Store

if TYPE_CHECKING:  # who only looks at a run loads no model
    from memmcl.search.spec import SearchSpec
    from tasks.run.runtime import Run


class Pinned(BaseModel):
    """What an earlier run made and this one works on, so that rows that change in one subtask move no other expert."""

    model_config = ConfigDict(frozen=True)

    anchors: ArtifactRef | None = None
    warm: ArtifactRef | None = None


class SearchEntry(BaseModel):
    """One search of a run: what it is called, under which key its records lie, how many there may be."""

    model_config = ConfigDict(frozen=True)

    name: str
    key: str
    evaluations: int
    rows: str
    subtasks: tuple[str, ...]


class Journal(BaseModel):
    """A run that was started, finished or not, and the searches that it has begun."""

    model_config = ConfigDict(frozen=True)

    run_id: str
    started: str
    config: dict[str, Any]
    pinned: Pinned = Pinned()
    searches: tuple[SearchEntry, ...] = ()


def note_run(store: Store, run: Run) -> None:
    """Write down that a run was started, its settings, and what it took over; the first time stands."""
    config, started = run.config.model_dump(mode="json"), datetime.now(UTC).isoformat(timespec="seconds")
    restore_journal(store, Journal(run_id=run.id, started=started, config=config, pinned=run.pinned))


def note_search(store: Store, run: Run, spec: SearchSpec) -> None:
    """Write down that a search of a run has begun."""
    entry = SearchEntry(
        name=spec.name, key=spec.key, evaluations=spec.evaluations, rows=spec.rows, subtasks=spec.subtasks
    )
    store.append(_log(run.id), 1 + int(spec.key[:6], 16), entry.model_dump(mode="json"))


def read_journal(store: Store, run_id: str) -> Journal:
    """Return the journal of the run whose id starts so; what of it is damaged, from the report of a finished run.

    Raises:
        DataError: no such run, or more than one.
    """
    finished = _finished(store)
    found = sorted({*store.objects.folders("logs/runs")} | finished)
    fitting = [
        name
        for name in found
        if name.startswith(run_id) and (name in finished or store.objects.entries(f"logs/{_log(name)}"))
    ]
    if len(fitting) != 1:
        known = ", ".join(name[:8] for name in fitting or found) or "none"
        what = f"more than one run starts with {shown(run_id)}" if fitting else f"no run {shown(run_id)} was started"
        raise DataError(f"{what} in {store.url}; there are {known}")
    records = store.records(_log(fitting[0]))
    said = records.get(0, {})
    if "pinned" not in said:
        said = {**_said_by_report(store, fitting[0]), **said}
    try:
        entries = [SearchEntry.model_validate(record) for index, record in records.items() if index]
        return Journal(run_id=fitting[0], searches=tuple(sorted(entries, key=lambda one: one.name)), **said)
    except ValidationError as error:
        raise DataError(
            f"the settings of run {fitting[0][:8]} cannot be read in {store.url}; start it by its file"
        ) from error


def searches_of(store: Store, run_id: str) -> list[str]:
    """Return the keys of the searches that a run has begun, as far as its whole records tell."""
    return [record["key"] for index, record in store.records(_log(run_id)).items() if index]


def restore_journal(store: Store, journal: Journal) -> None:
    """Write down again what a run was started with, where that was damaged or never written."""
    said = journal.model_dump(mode="json", include={"config", "pinned", "started"})
    store.append(_log(journal.run_id), 0, said)


def _finished(store: Store) -> set[str]:
    """Return the ids of all finished runs, whole or not."""
    return {Path(path).stem for path in store.objects.sizes("manifests/run") if path.endswith(".json")}


def _said_by_report(store: Store, run_id: str) -> dict[str, Any]:
    """Return what the report of a finished run says of how it was started; nothing where that is not whole."""
    done = store.find("run", run_id)
    if done is None:
        return {}
    kept = {kind: ref for kind in Pinned.model_fields for ref in done.inputs if ref.kind == kind}
    config = json.loads(store.read(done, "results.json"))["run"]["config"]
    return {"config": config, "started": done.created, "pinned": kept}


def _log(run_id: str) -> str:
    return f"runs/{run_id}"
