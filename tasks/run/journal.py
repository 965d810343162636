"""The journal of a run: its settings and searches, so that it can be shown while it runs, and resumed by its id."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from memmcl.errors import DataError, shown
from memmcl.store import ArtifactRef, Store
from memmcl.urls import redacted

if TYPE_CHECKING:  # who only looks at a run loads no model
    from memmcl.search.spec import SearchSpec
    from tasks.run.runtime import Run


class Pinned(BaseModel, frozen=True):
    """Artifacts of an earlier run that this one uses: rows that change in one subtask then retrain no other expert."""

    anchors: ArtifactRef | None = None
    warm: ArtifactRef | None = None


class SearchEntry(BaseModel, frozen=True, from_attributes=True):
    """One search of a run: its name, the key of its records, and how many there may be."""

    name: str
    key: str
    evaluations: int
    rows: str
    subtasks: tuple[str, ...]


class Journal(BaseModel, frozen=True):
    """A run that was started, finished or not, and the searches that it has begun."""

    run_id: str
    started: str
    config: dict[str, Any]
    pinned: Pinned = Pinned()
    searches: tuple[SearchEntry, ...] = ()


def note_run(store: Store, run: Run) -> None:
    """Write down the settings of a run and its pinned artifacts, as it starts; the first record stays."""
    config, started = run.config.model_dump(mode="json"), datetime.now(UTC).isoformat(timespec="seconds")
    restore_journal(store, Journal(run_id=run.id, started=started, config=config, pinned=run.pinned))


def note_search(store: Store, run: Run, spec: SearchSpec) -> None:
    """Write down that a search of a run has begun."""
    entry = SearchEntry.model_validate(spec)
    store.append(_log(run.id), 1 + int(spec.key[:6], 16), entry.model_dump(mode="json"))


def read_journal(store: Store, run_id: str) -> Journal:
    """Return the journal of the one run whose id starts so, or raise a DataError; the report mends damaged settings."""
    finished = {Path(path).stem for path in store.objects.sizes("manifests/run") if path.endswith(".json")}
    started = sorted({*store.objects.folders("logs/runs")} | finished)
    fitting = [
        name
        for name in started
        if name.startswith(run_id) and (name in finished or store.objects.entries(f"logs/{_log(name)}"))
    ]
    if len(fitting) != 1:
        known = ", ".join(name[:8] for name in fitting or started) or "none"
        what = f"more than one run starts with {shown(run_id)}" if fitting else f"no run {shown(run_id)} was started"
        raise DataError(f"{what} in {store.url}; there are {known}")
    records = store.records(_log(fitting[0]))
    settings = records.get(0, {})
    if "pinned" not in settings:
        settings = {**_settings_in_report(store, fitting[0]), **settings}
    try:
        entries = [SearchEntry.model_validate(record) for index, record in records.items() if index]
        return Journal(run_id=fitting[0], searches=tuple(sorted(entries, key=lambda one: one.name)), **settings)
    except ValidationError as error:
        raise DataError(
            f"the settings of run {fitting[0][:8]} cannot be read in {store.url}; start it by its file"
        ) from error


def searches_of(store: Store, run_id: str) -> list[str]:
    """Return the keys of the searches that a run has begun, as far as its whole records tell."""
    return [record["key"] for index, record in store.records(_log(run_id)).items() if index]


def restore_journal(store: Store, journal: Journal) -> None:
    """Write the settings of a run again, where they were damaged or never written."""
    store.append(_log(journal.run_id), 0, journal.model_dump(mode="json", include={"config", "pinned", "started"}))


def _settings_in_report(store: Store, run_id: str) -> dict[str, Any]:
    """Return the settings in the report of a finished run; nothing where that is damaged."""
    done = store.find("run", run_id)
    if done is None:
        return {}
    kept = {kind: ref for kind in Pinned.model_fields for ref in done.inputs if ref.kind == kind}
    config = redacted(json.loads(store.read(done, "results.json"))["run"]["config"])
    return {"config": config, "started": done.created, "pinned": kept}


def _log(run_id: str) -> str:
    return f"runs/{run_id}"
