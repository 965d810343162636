"""The damage of one run, and the removal of what no stage would write again."""

from __future__ import annotations

from memmcl.store import Problem, Store
from memmcl.store.verify import drop_damaged
from tasks.run.journal import Journal, restore_journal, searches_of


def damage_of(store: Store, run_id: str) -> tuple[Problem, ...]:
    """Return the damaged or missing artifacts of a finished run."""
    return store.run_closure(run_id).problems


def clear_damage(store: Store, journal: Journal) -> list[str]:
    """Remove the damage that no stage replaces by publishing again: in records and checkpoints; return the paths."""
    removed = [*drop_damaged_records(store, journal.run_id), *drop_damaged(store.objects, "checkpoints")]
    restore_journal(store, journal)
    return removed


def drop_damaged_records(store: Store, run_id: str) -> list[str]:
    """Remove the damaged records of a run and its searches, which no stage would write again; return their paths."""
    folders = [f"logs/runs/{run_id}/", *(f"logs/searches/{key}/" for key in searches_of(store, run_id))]
    return [path for folder in folders for path in drop_damaged(store.objects, folder)]
