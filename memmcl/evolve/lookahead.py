"""The asynchronous search without workers: what to evaluate next, in an order that timing cannot change.

Ask i happens after exactly max(0, i - lookahead) tells, and tells happen strictly in ask order through a reorder
buffer. So the sequence of genomes is a function of strategy, fitness values and `lookahead`; the number of workers, the
order in which they finish and how often the search was killed have no part in it. At most lookahead + 1 proposals are
open, so `lookahead` >= workers keeps all of them busy most of the time, without the barrier of a generation.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Mapping
from typing import Any

from memmcl.errors import ConfigError, SearchError
from memmcl.evolve.racing import Hurdle, Race
from memmcl.evolve.strategy import Genome, Proposal, Strategy, maximised
from memmcl.evolve.threads import one_blas_thread

log = logging.getLogger(__name__)

Record = dict[str, Any]


class LookAhead:
    """Drive a fresh `strategy` for `budget` asks.

    records: results of an earlier, killed search, index -> record with "genome" and "fitness"; a record whose
    genome is the proposal's is used without evaluation, any other is ignored with a warning. The strategy is told what
    the recorded genome is, so that costly asks are not made again, as long as no record was ignored.

        search = LookAhead(strategy, budget=20, lookahead=2)
        while not search.finished:
            proposal = search.next()
            search.done(proposal.index, {"fitness": evaluate(proposal.genome)})

    A proposal whose genome was proposed before is never handed out: it completes with the earlier one's
    record (plus "reused_from": index). It counts against the budget, so a search that has converged ends.

    stagnation: no more is asked once so many told results in a row, seeds not counted, brought nothing better; None:
    the budget alone ends the search. race: proposals get hurdles; a record then holds "rungs" and "stopped" too, and
    the fitness of a stopped candidate is an estimate: it is told to the strategy, and never the best.

    Raises:
        ConfigError: budget < 1 or lookahead < 0.
        SearchError: the strategy was asked before.
    """

    def __init__(
        self,
        strategy: Strategy,
        *,
        budget: int,
        lookahead: int,
        records: Mapping[int, Mapping[str, Any]] | None = None,
        stagnation: int | None = None,
        race: Race | None = None,
    ) -> None:
        if budget < 1 or lookahead < 0:
            raise ConfigError(f"search needs budget >= 1 and lookahead >= 0, got {budget} and {lookahead}")
        self._strategy = strategy
        self._budget = budget
        self._lookahead = lookahead
        self._stagnation = stagnation
        self._race = race
        self._hurdles: list[tuple[Hurdle | None, ...]] = []
        self._since_best = 0
        self._best = -math.inf
        self._closed = False
        self._earlier = dict(records or {})
        self._fitting = True  # all records so far
        self._proposals: list[Proposal] = []
        self._records: dict[int, Record] = {}
        self._first: dict[Genome, int] = {}
        self._twins: dict[int, list[int]] = {}
        self._queue: deque[int] = deque()
        self._told = 0
        self._advance()

    @property
    def told(self) -> int:
        """How many results the strategy was told, in ask order."""
        return self._told

    @property
    def completed(self) -> int:
        """How many proposals have a record, told or not yet."""
        return len(self._records)

    @property
    def finished(self) -> bool:
        """Whether no more is asked for, and every proposal has a record and was told."""
        return self._asked_all and self._told == len(self._proposals)

    @property
    def stopped_early(self) -> bool:
        """Whether the search ended, or is ending, before its budget."""
        return self._closed

    @property
    def _asked_all(self) -> bool:
        return self._closed or len(self._proposals) == self._budget

    @property
    def proposals(self) -> tuple[Proposal, ...]:
        """All proposals asked so far, by index."""
        return tuple(self._proposals)

    @property
    def records(self) -> dict[int, Record]:
        """All records so far, by index, each with "genome" and "fitness" (-inf: failed); copies."""
        return {index: dict(self._records[index]) for index in sorted(self._records)}

    def next(self) -> Proposal | None:
        """Return a proposal to evaluate; None: wait for a result, or the search is finished."""
        while self._queue:
            index = self._queue.popleft()
            if index not in self._records:
                return self._proposals[index]
        return None

    def hurdles(self, index: int) -> tuple[Hurdle | None, ...]:
        """Return what proposal `index` must reach at each rung; empty without a race."""
        return self._hurdles[index]

    def stop(self) -> None:
        """Ask for no more: the time is over. What is handed out or queued is still waited for."""
        self._closed = True
        self._advance()

    def done(self, index: int, record: Mapping[str, Any]) -> tuple[int, ...]:
        """Take the result of proposal `index`; return the indices it completed (twins of its genome too).

        record: holds "fitness" (maximised; None, NaN or infinite means failed), "objectives" (maximised, for
        strategies that want several) and whatever is to be kept beside them. The first result of an index
        stands; a later one (of a worker that was thought lost) changes nothing.

        Raises:
            SearchError: an index that was never handed out, or a record without "fitness" or of another genome.
        """
        proposal = self._handed_out(index)
        if index in self._records:
            return ()
        if "fitness" not in record:
            raise SearchError(f"result of proposal {index} has no `fitness`, only {sorted(record)}")
        if tuple(record.get("genome", proposal.genome)) != proposal.genome:
            asked = list(proposal.genome)
            raise SearchError(f"result of proposal {index} is of genome {record['genome']}, expected {asked}")
        self._keep(proposal, record)
        completed = (index, *self._twins.pop(index, []))
        for twin in completed[1:]:
            self._reuse(twin, index)
        self._advance()
        return completed

    def retry(self, index: int) -> None:
        """Let `next` hand out proposal `index` again, before any other: the worker that had it was lost.

        Raises:
            SearchError: an index that was never handed out.
        """
        self._handed_out(index)
        if index not in self._records and index not in self._queue:
            self._queue.appendleft(index)

    def best(self) -> tuple[Proposal, Record]:
        """Return the proposal with the highest fitness so far, and its record (ties: the earlier index).

        Raises:
            SearchError: nothing has a finite fitness.
        """
        for proposal in self.ranked():
            return proposal, dict(self._records[proposal.index])
        count = len(self._records)
        raise SearchError(f"none of {count} candidates has a finite fitness; see the log for their genomes")

    def ranked(self) -> list[Proposal]:
        """Return the proposals that were scored on all rows, each genome once, the best first (ties: the earlier)."""
        whole = {
            index: record["fitness"]
            for index, record in self._records.items()
            if "reused_from" not in record and not record.get("stopped") and math.isfinite(record["fitness"])
        }
        return [self._proposals[index] for index in sorted(whole, key=lambda index: (-whole[index], index))]

    def _advance(self) -> None:
        """Tell and ask as far as the rule allows."""
        with one_blas_thread():
            while True:
                index = len(self._proposals)
                tells = index if self._asked_all else max(0, index - self._lookahead)
                while self._told < tells and self._told in self._records:
                    self._tell(self._told)
                if self._asked_all or self._told < tells:
                    return
                if self._stagnation is not None and self._since_best >= self._stagnation:
                    self._closed = True
                    continue
                recorded = tuple(self._earlier.get(index, {}).get("genome", ())) if self._fitting else ()
                self._admit(self._strategy.ask(recorded or None))

    def _tell(self, index: int) -> None:
        """Tell one result; seeds, which come first, do not count as steps without improvement."""
        record = self._records[index]
        self._strategy.tell(index, record["fitness"], record.get("objectives"))
        self._told += 1
        better = record["fitness"] > self._best and not record.get("stopped")
        self._best = record["fitness"] if better else self._best
        seed = self._proposals[index].generation == 0
        self._since_best = 0 if better or seed else self._since_best + 1

    def _admit(self, proposal: Proposal) -> None:
        """Complete `proposal` from what is known, or queue it for evaluation."""
        index = proposal.index
        if index != len(self._proposals):
            raise SearchError(f"expected a fresh strategy's proposal {len(self._proposals)}, got {index}")
        self._proposals.append(proposal)
        told = (self._records[i] for i in range(self._told))  # all that the rule wants told before this ask, no more
        self._hurdles.append(self._race.hurdles(list(told)) if self._race is not None else ())
        first = self._first.setdefault(proposal.genome, index)
        earlier = self._earlier.get(index)
        if earlier is not None and ("fitness" not in earlier or tuple(earlier.get("genome", ())) != proposal.genome):
            log.warning("saved record of proposal %d is of another genome; it is ignored", index)
            earlier, self._fitting = None, False
        if first in self._records:
            self._reuse(index, first)
        elif first != index:
            self._twins.setdefault(first, []).append(index)
        elif earlier is not None:
            self._keep(proposal, earlier)
        else:
            self._queue.append(index)

    def _keep(self, proposal: Proposal, record: Mapping[str, Any]) -> None:
        value = maximised(record["fitness"])
        self._records[proposal.index] = {**record, "genome": list(proposal.genome), "fitness": value}

    def _reuse(self, index: int, first: int) -> None:
        self._records[index] = {**self._records[first], "reused_from": first}

    def _handed_out(self, index: int) -> Proposal:
        if not 0 <= index < len(self._proposals) or self._first[self._proposals[index].genome] != index:
            raise SearchError(f"proposal {index} was never handed out for evaluation; use indices that next() gave")
        return self._proposals[index]
