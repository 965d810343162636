"""Strategies built by name, as the table `STRATEGIES` lists them, or restored from their state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from memmcl.config.strategies import STRATEGIES
from memmcl.errors import ConfigError, SearchError
from memmcl.evolve.arguments import Arguments
from memmcl.evolve.bayesian import Bayesian, RandomSearch
from memmcl.evolve.cmaes import CmaEs
from memmcl.evolve.genetic import Genetic, nsga2
from memmcl.evolve.strategy import Strategy

_CLASSES: dict[str, Callable[[Arguments], Strategy]] = {
    "bayesian": Bayesian,
    "cmaes": CmaEs,
    "genetic": Genetic,
    "nsga2": nsga2,
    "random": RandomSearch,
}


def build_strategy(name: str, **arguments: Any) -> Strategy:
    """Return the strategy `name` of `STRATEGIES`; arguments: those of `Arguments`.

    Raises:
        ConfigError: an unknown name; an argument out of range; restarts or separable for another strategy than CMA-ES.
        GenomeError: a seed of the wrong length, out of bounds, or between on and off.
    """
    if name not in STRATEGIES:
        raise ConfigError(f"unknown search strategy `{name}`; choose one of {', '.join(sorted(STRATEGIES))}")
    checked = Arguments(**arguments)
    row = STRATEGIES[name]
    if checked.update not in row.updates:
        raise ConfigError(
            f"search update `{checked.update}` is not for {name}, which {row.learns}; leave it {row.updates[0]}"
        )
    if not row.restarts and (checked.restarts or checked.separable is not None):
        raise ConfigError(f"search restarts and separable are of cmaes, not of {name}; leave them unset")
    return _CLASSES[name](checked)


def restore(state: Mapping[str, Any]) -> Strategy:
    """Return the strategy whose `state()` this is, by repeating its asks (without what is costly) and tells.

    Raises:
        SearchError: an ask proposes another genome than the history holds (other code or library version).
    """
    strategy = build_strategy(state["strategy"], **state["arguments"])
    for event in state["history"]:
        if event[0] == "tell":
            strategy.tell(*event[1:])  # index, fitness, objectives; earlier versions wrote no objectives
            continue
        proposal = strategy.ask(tuple(event[1]))
        if list(proposal.genome) != list(event[1]):
            raise SearchError(
                f"replayed proposal {proposal.index} is {list(proposal.genome)}, the saved search had "
                f"{event[1]}; was it written by another version? start the search anew"
            )
    return strategy
