"""The queue that the workers of a search take candidates from: a Ray actor, within reach of every node.

It imports neither torch nor Tune: its process starts quickly and stays small.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from memmcl.errors import ServiceError

WORKERS = 10_000
"""How many may wait at once."""
Candidate = Mapping[str, Any]
"""All that a worker needs to evaluate a candidate, and the candidate's number."""


class _Actor:
    def __init__(self) -> None:
        self._candidates: deque[Candidate] = deque()
        self._taken: dict[str, int] = {}
        self._gone: set[str] = set()
        self._closed = False
        self._changed = asyncio.Condition()

    async def put(self, candidate: Candidate, first: bool) -> None:
        async with self._changed:
            (self._candidates.appendleft if first else self._candidates.append)(candidate)
            self._changed.notify_all()

    async def take(self, worker: str) -> Candidate | None:
        async with self._changed:
            await self._changed.wait_for(lambda: self._candidates or self._closed or worker in self._gone)
            if self._closed or worker in self._gone:
                return None
            candidate = self._candidates.popleft()
            self._taken[worker] = candidate["number"]
            return candidate

    async def lost(self, worker: str) -> int | None:
        async with self._changed:
            self._gone.add(worker)
            self._changed.notify_all()
            return self._taken.get(worker)

    async def close(self) -> None:
        async with self._changed:
            self._closed = True
            self._changed.notify_all()


class RayQueue:
    """A queue in an actor beside this process, from the first candidate until `kill`; it can be sent to workers.

    Raises:
        ServiceError: the actor is lost.
    """

    def __init__(self) -> None:
        self._actor: Any = None

    def put(self, candidate: Candidate, first: bool = False) -> None:
        """Hand out a candidate, to be taken after those that wait, or before."""
        if self._actor is None:
            here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
            actor = ray.remote(_Actor).options(num_cpus=0, max_concurrency=WORKERS, scheduling_strategy=here)
            self._actor = actor.remote()
        self._actor.put.remote(candidate, first)

    def take(self, worker: str) -> Candidate | None:
        """Wait for the next candidate; None: there is none for this worker any more."""
        candidate: Candidate | None = self._ask(self._actor.take.remote(worker))
        return candidate

    def lost(self, worker: str) -> int | None:
        """Hand a worker no more candidates; return the number of the one that it took last."""
        number: int | None = self._ask(self._actor.lost.remote(worker))
        return number

    def close(self) -> None:
        """Hand out no more; workers that wait get None."""
        self._actor.close.remote()

    def kill(self) -> None:
        """End the actor."""
        if self._actor is not None:
            ray.kill(self._actor)

    def _ask(self, answer: ray.ObjectRef[Any]) -> Any:
        try:
            return ray.get(answer)
        except RayActorError as error:
            raise ServiceError(
                "the process that hands out candidates is gone; run the same command again: no result is lost"
            ) from error
