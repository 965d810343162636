"""The champion: the run whose model is in use, and everything that was champion before it.

The whole history lies in one pointer, `champions/NAME`, so that a promotion and its record are one compare-and-swap:
no crash leaves one without the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from memmcl.errors import CorruptArtifact, UsageError, shown
from memmcl.store.lease import Lease
from memmcl.store.store import Store


class Reign(BaseModel):
    """One entry of the history: which run became champion, when, how, and why.

    run_id: key of the run's artifact. how: "promotion" by a retrain, "rollback" by a person. unified: the model's
    mean test score in its own report, and its standard error.
    """

    model_config = ConfigDict(frozen=True)

    run_id: str
    name: str
    since: str
    how: Literal["promotion", "rollback"]
    why: str
    unified: float | None = None
    unified_se: float | None = None
    flow_run_id: str | None = None


class _History(BaseModel):
    """What the pointer holds."""

    history: tuple[Reign, ...]


@dataclass(frozen=True)
class Champions:
    """The history of one champion, oldest entry first, and the token that the next change must show."""

    name: str
    history: tuple[Reign, ...]
    token: str | None

    @property
    def current(self) -> Reign | None:
        """The entry that holds now; None when there never was a champion."""
        return self.history[-1] if self.history else None

    @property
    def line(self) -> tuple[str, ...]:
        """Run ids of the champion and of those it followed, oldest first; what was rolled back is not among them."""
        line: list[str] = []
        for reign in self.history:
            if reign.run_id in line:
                del line[line.index(reign.run_id) + 1 :]
            else:
                line.append(reign.run_id)
        return tuple(line)

    @property
    def rolled_back(self) -> frozenset[str]:
        """Run ids that were champion once and that a rollback took out of the line."""
        return frozenset(reign.run_id for reign in self.history) - frozenset(self.line)


def read_champions(store: Store, name: str) -> Champions:
    """Return the history of champion `name`, empty at first. Raises CorruptArtifact if it cannot be read."""
    value, token = store.look_at_pointer(_pointer(name))
    if token is None:
        return Champions(name, (), None)
    try:
        return Champions(name, _History.model_validate(value).history, token)
    except ValidationError as error:
        path = f"{store.url}/pointers/{_pointer(name)}.json"
        raise CorruptArtifact(
            f"the history of champion {shown(name)} is damaged ({path}); put a backup of that object in its place, or "
            "remove it to begin anew: the next retrain then makes the first champion"
        ) from error


def promote(store: Store, champions: Champions, reign: Reign) -> Champions:
    """Make `reign` the current entry, by compare-and-swap. Raises Conflict if the champion changed meanwhile."""
    history = (*champions.history, reign)
    value = {"history": [entry.model_dump(mode="json") for entry in history]}
    token = store.swap_pointer(_pointer(champions.name), value, champions.token)
    return Champions(champions.name, history, token)


def rollback(store: Store, champions: Champions, to: str | None = None) -> Champions:
    """Give the place back to the champion before the current one, or to the former champion whose id begins with `to`.

    Raises:
        UsageError: there is no such former champion, or its run is no longer whole in the store.
        Conflict: the champion changed since `champions` was read.
        LeaseHeld: another process rolls it back at this moment.
    """
    target = _target(champions, to)
    with Lease(store, f"rollback-{champions.name}", {}):  # or a garbage collection could take the run meanwhile
        if store.find("run", target.run_id) is None:
            raise UsageError(
                f"run {target.run_id[:8]} is not whole in {store.url}: it cannot be champion again; "
                f"`memmcl store verify --repair {target.run_id[:8]}` makes again what is damaged, `--to` takes "
                "another former champion"
            )
        current = champions.history[-1]
        reign = target.model_copy(
            update={"since": now(), "how": "rollback", "why": f"rolled back from run {current.run_id[:8]}"}
        )
        return promote(store, champions, reign)


def now() -> str:
    """Return the time as an entry carries it: UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _target(champions: Champions, to: str | None) -> Reign:
    if champions.current is None:
        raise UsageError(f"there is no champion {shown(champions.name)} to roll back; a retrain promotes the first one")
    former = {reign.run_id: reign for reign in champions.history if reign.run_id != champions.current.run_id}
    if to is None:
        if len(champions.line) < 2:
            raise UsageError(
                f"run {champions.current.run_id[:8]} is the only champion in the line; nothing to roll back to"
            )
        return former[champions.line[-2]]
    matches = [reign for run_id, reign in former.items() if run_id.startswith(to)]
    if len(matches) != 1:
        known = ", ".join(run_id[:8] for run_id in former) or "none"
        raise UsageError(f"expected the id of one former champion, got {shown(to)}; former champions: {known}")
    return matches[0]


def _pointer(name: str) -> str:
    return f"champions/{name}"
