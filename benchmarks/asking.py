"""What the driver spends on a search: CPU seconds of its asks, and of a resume.

    python benchmarks/asking.py [--strategies bayesian cmaes] [--candidates 100] [--genes 6] [--repeats 3]

By turns in one process, the same search on a fitness that costs nothing: asked with one BLAS thread, as the look-ahead
core does, and with as many as there are cores, as numpy does by itself. Then the finished search is taken up again from
its records: as it is done, and by a strategy that is not told what was recorded, so that every ask is made again. CPU
seconds are those of all threads of the process; of the repeats the median and, in brackets, the range.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

from threadpoolctl import threadpool_limits

from memmcl.evolve import LookAhead, Proposal, build_strategy
from memmcl.evolve.strategy import Genome, Strategy

Records = Mapping[int, Mapping[str, Any]]


class Forgetful:
    """A strategy that is not told what was recorded."""

    def __init__(self, strategy: Strategy) -> None:
        self._strategy = strategy
        self.tell, self.state = strategy.tell, strategy.state

    def ask(self, recorded: Genome | None = None) -> Proposal:
        """Return the next proposal, made anew."""
        return self._strategy.ask()


@contextmanager
def all_cores() -> Iterator[None]:
    """Let BLAS have every core while a strategy is asked."""
    cores = len(os.sched_getaffinity(0))
    with patch("memmcl.evolve.lookahead.one_blas_thread", nullcontext), threadpool_limits(cores, user_api="blas"):
        yield


def searched(asked: argparse.Namespace, name: str, records: Records, *, forgetful: bool = False) -> LookAhead:
    """Return a search at its end."""
    strategy = build_strategy(name, genes=asked.genes, bounds=(0.0, 1.5), seeds=[], seed=1, sigma=0.15)
    core = LookAhead(
        Forgetful(strategy) if forgetful else strategy,
        budget=asked.candidates,
        lookahead=asked.lookahead,
        records=records,
    )
    while (proposal := core.next()) is not None:
        core.done(proposal.index, {"fitness": -math.fsum((gene - 0.5) ** 2 for gene in proposal.genome)})
    return core


def spent(act: Callable[[], LookAhead]) -> tuple[float, LookAhead]:
    """Return the CPU seconds of a search, and the search."""
    begin = time.process_time()
    core = act()
    return time.process_time() - begin, core


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategies", nargs="+", default=["bayesian", "cmaes", "genetic", "random"])
    parser.add_argument("--candidates", type=int, default=100)
    parser.add_argument("--genes", type=int, default=6)
    parser.add_argument("--lookahead", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    print(
        "| strategy | asks, one thread | all cores | resume from records | asks made again |\n|---|---:|---:|---:|---:|"
    )
    for name in asked.strategies:
        columns: list[list[float]] = [[], [], [], []]
        for _ in range(asked.repeats):
            one, core = spent(partial(searched, asked, name, {}))
            with all_cores():
                several, _ = spent(partial(searched, asked, name, {}))
            kept, records = [], core.records
            for forgetful in (False, True):
                seconds, again = spent(partial(searched, asked, name, records, forgetful=forgetful))
                if again.proposals != core.proposals:
                    raise SystemExit(f"{name}: a resume proposed something else")
                kept.append(seconds)
            for column, seconds in zip(columns, [one, several, *kept], strict=True):
                column.append(seconds)
        told = [f"{statistics.median(one):.2f} ({min(one):.2f}-{max(one):.2f})" for one in columns]
        print(f"| {name} | {' | '.join(told)} |", flush=True)


if __name__ == "__main__":
    main()
