"""The demonstrations that a subtask's prompt begins with: the published curriculum and its ablations.

A curriculum context has demonstrations from the easier subtasks in ascending difficulty, then the subtask's own, then
the query. `curriculum`, `reversed` and `random` differ in the order of the other subtasks' demonstrations alone: the
ablation isolates order. How many fit, and which go first, is our decision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from memmcl.config.run import CONTEXTS, CurriculumConfig
from memmcl.errors import ConfigError, DataError
from memmcl.seeds import derive

if TYPE_CHECKING:
    from memmcl.suite.examples import Example
    from memmcl.suite.prompts import Prompter
    from memmcl.suite.subtasks import Subtask

TRIES = 4  # candidates looked at per wanted demonstration before it is given up as too long

Demonstration = tuple[str, "Example"]


@dataclass(frozen=True)
class Context:
    """Demonstrations (subtask name, example) for prompts of `subtask`, in order; `tokens` is their sum."""

    kind: str
    subtask: str
    demonstrations: tuple[Demonstration, ...]
    tokens: int


@dataclass(frozen=True)
class Shots:
    """At most how many demonstrations a context holds: of the subtask itself, of each easier one, and in tokens."""

    own: int
    others: int
    tokens: int


def build_context(
    kind: str,
    subtask_name: str,
    *,
    order: Sequence[str],
    demonstrations: Mapping[str, Sequence[Example]],
    shots: Shots,
    count_tokens: Callable[[str, Example], int],
    seed: int,
) -> Context:
    """Return the context `kind` (one of `CONTEXTS`) of `subtask_name`.

    order: all subtask names, easiest first. demonstrations: candidates per subtask name (train rows). count_tokens:
    the tokens of an example of a subtask, by its name.

    Demonstrations are one per label in turn, drawn by `seed` and the names, whatever the order of the candidates. The
    subtask's own are chosen first and stand last, next to the query; then come those of the easier subtasks, nearest in
    difficulty first. One that does not fit the budget is skipped, and the next of its label takes its place (`TRIES`).
    For the easiest subtask `curriculum` equals `own-shots`.

    Raises:
        ConfigError: an unknown kind, or a negative count or budget.
        DataError: `order` lacks the subtask or holds a name twice.
    """
    if kind not in CONTEXTS:
        raise ConfigError(f"unknown context `{kind}`; choose one of {', '.join(CONTEXTS)}")
    if min(shots.own, shots.others, shots.tokens) < 0:
        raise ConfigError(f"context needs counts and a budget of 0 or more, got {shots}")
    if list(order).count(subtask_name) != 1 or len(set(order)) != len(order):
        raise DataError(f"the curriculum {list(order)} must hold every subtask once, and {subtask_name} among them")

    sources = [] if kind == "zero-shot" else [subtask_name]
    if kind not in ("zero-shot", "own-shots"):
        sources += reversed(order[: list(order).index(subtask_name)])  # the nearest in difficulty first
    left = shots.tokens
    chosen: list[list[Demonstration]] = []  # one list per source
    for source in sources:
        rows, count = demonstrations.get(source, ()), shots.own if source == subtask_name else shots.others
        taken, used = _choose(source, rows, count, left, count_tokens, derive(seed, "context", subtask_name))
        chosen.append(taken)
        left -= used
    own, *others = chosen or [[]]
    arranged = _arrange(kind, others, derive(seed, "context", subtask_name, "random"))
    return Context(kind, subtask_name, (*arranged, *own), shots.tokens - left)


def context_of(
    kind: str,
    cfg: CurriculumConfig,
    subtasks: Mapping[str, Subtask],
    subtask: Subtask,
    prompter: Prompter,
    rows: Mapping[str, Sequence[Example]],
    order: Sequence[str],
    seed: int,
) -> Context:
    """Return the context `kind` of a subtask; demonstrations are drawn from `rows`, by name of the subtask.

    order: all subtasks, the easiest first. seed: of the run.
    """
    return build_context(
        kind,
        subtask.name,
        order=order,
        demonstrations=rows,
        shots=Shots(cfg.own_shots, cfg.shots_per_subtask, cfg.budget_tokens),
        count_tokens=lambda name, row: prompter.demonstration_tokens(subtasks[name], row, subtask),
        seed=derive(seed, "context", subtask.name),
    )


def _arrange(kind: str, others: list[list[Demonstration]], seed: int) -> list[Demonstration]:
    """Flatten `others` (nearest in difficulty first): here alone the curriculum and its ablations differ."""
    by_subtask = others if kind == "reversed" else reversed(others)
    arranged = [demonstration for chosen in by_subtask for demonstration in chosen]
    if kind == "random":
        return [arranged[i] for i in np.random.default_rng(seed).permutation(len(arranged))]
    return arranged


def _choose(
    source: str,
    rows: Sequence[Example],
    shots: int,
    budget: int,
    count_tokens: Callable[[str, Example], int],
    seed: int,
) -> tuple[list[Demonstration], int]:
    """Return up to `shots` label-balanced demonstrations that fit into `budget`, and their tokens."""
    queues = _queues(rows, derive(seed, source))
    chosen: list[Demonstration] = []
    used = 0
    tries = TRIES * shots
    while queues and len(chosen) < shots and tries > 0:
        queue = queues.pop(0)
        for row in queue:
            tries -= 1
            tokens = count_tokens(source, row)
            fits = used + tokens <= budget
            if fits:
                chosen.append((source, row))
                used += tokens
                queues.append(queue)
            if fits or tries == 0:
                break
    return chosen, used


def _queues(rows: Sequence[Example], seed: int) -> list[Iterator[Example]]:
    """Return one shuffled queue of rows per label, the labels shuffled too; both by `seed` and ids alone."""
    by_label: dict[str, list[Example]] = {}
    for row in rows:
        by_label.setdefault(_label(row), []).append(row)
    labels = sorted(by_label, key=lambda label: derive(seed, "label", label))
    return [iter(sorted(by_label[label], key=lambda row: derive(seed, "row", row.id))) for label in labels]


def _label(row: Example) -> str:
    """The label that demonstrations are balanced by: the polarity (last element) of a row's first tuple."""
    if isinstance(row.gold, str):
        return row.gold
    return row.gold[0][-1] if row.gold else ""
