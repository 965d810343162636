"""One BLAS thread while a strategy asks and learns: as many as before afterwards, and the same bits on any machine."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from threadpoolctl import OpenBLASController, threadpool_info, threadpool_limits

from memmcl.evolve import LookAhead, Proposal

ASKS = """
import hashlib
from memmcl.evolve import LookAhead, build_strategy
from memmcl.evolve.bayesian import Process

seen, hope = hashlib.sha256(), Process.hope

def noted(process, points):
    found = hope(process, points)
    seen.update(found.tobytes())
    return found

Process.hope = noted
strategy = build_strategy("bayesian", genes=6, bounds=(0.0, 1.5), seeds=[], seed=1, population=200)
search = LookAhead(strategy, budget=206, lookahead=2)
while not search.finished:
    proposal = search.next()
    search.done(proposal.index, {"fitness": -sum((gene - 0.5) ** 2 for gene in proposal.genome)})
print(seen.hexdigest(), [proposal.genome for proposal in search.proposals[200:]])
"""


def blas_threads() -> set[int]:
    return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """Give BLAS two threads, whatever this machine and its environment say; any thread may then set others."""
    limits = threadpool_limits(2, user_api="blas")
    OpenBLASController.clear_controlling_thread()
    yield
    limits.restore_original_limits()


class Noting:
    """Proposes 0, 1, 2, ... and notes with how many threads it is asked and told."""

    def __init__(self) -> None:
        self.asked = 0
        self.threads: list[set[int]] = []

    def ask(self, recorded: Any = None) -> Proposal:
        self.threads.append(blas_threads())
        self.asked += 1
        return Proposal(self.asked - 1, (float(self.asked),), "noting", 1)

    def tell(self, index: int, fitness: float | None, objectives: Any = None) -> None:
        self.threads.append(blas_threads())

    def state(self) -> dict[str, Any]:
        return {}


def run(strategy: Noting, budget: int) -> None:
    search = LookAhead(strategy, budget=budget, lookahead=1)
    while (proposal := search.next()) is not None:
        search.done(proposal.index, {"fitness": 1.0})
    assert search.finished


def test_a_strategy_is_asked_and_told_with_one_thread_and_the_others_come_back() -> None:
    strategy = Noting()
    assert blas_threads() == {2}
    run(strategy, 3)
    assert strategy.threads == [{1}] * 6
    assert blas_threads() == {2}


class Contended:
    """A lock that says when somebody has to wait for it."""

    def __init__(self, waited_for: threading.Event) -> None:
        self.lock, self.waited_for = threading.Lock(), waited_for

    def __enter__(self) -> None:
        if not self.lock.acquire(blocking=False):
            self.waited_for.set()
            self.lock.acquire()

    def __exit__(self, *_: object) -> None:
        self.lock.release()


def test_two_searches_of_one_process_ask_by_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    come, first_is_over = threading.Event(), threading.Event()
    monkeypatch.setattr("memmcl.evolve.threads._LOCK", Contended(come))

    class Second(Noting):
        def ask(self, recorded: Any = None) -> Proposal:
            come.set()
            first_is_over.wait(60)  # without turns, the first one's end would give this one its threads back
            return super().ask(recorded)

    second = Second()
    other = threading.Thread(target=run, args=(second, 1))

    class First(Noting):
        def ask(self, recorded: Any = None) -> Proposal:
            other.start()
            assert come.wait(60)
            return super().ask(recorded)

    first = First()
    LookAhead(first, budget=1, lookahead=0)
    first_is_over.set()
    other.join()
    assert (first.threads, second.threads) == ([{1}], [{1}, {1}])
    assert blas_threads() == {2}


def test_asks_are_the_same_bits_with_one_thread_and_with_two() -> None:
    def asks(threads: int) -> str:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
        done = subprocess.run([sys.executable, "-c", ASKS], env=environment, capture_output=True, text=True, check=True)
        return done.stdout

    assert asks(1) == asks(2) != ""
