"""What rows are like: counts, label balance, lengths, leakage, and how far the best constant answer gets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from memmcl.suite.examples import Example, normalised
from memmcl.suite.metrics import best_constant
from memmcl.suite.overlap import Blocklist
from memmcl.suite.sources import SOURCE_SPLITS
from memmcl.suite.subtasks import Subtask

Pools = Mapping[str, Mapping[str, Sequence[Example]]]
"""Subtask -> part of `sources.SOURCE_SPLITS` -> rows."""


@dataclass(frozen=True)
class Lengths:
    """The 5th percentile, median, 95th percentile and maximum of the lengths of texts."""

    p5: float
    median: float
    p95: float
    max: int


@dataclass(frozen=True)
class SplitStats:
    """One part of one data set.

    texts: how many different contents its rows have.
    repeats: rows whose question (text and fields) an earlier row asks too.
    labels: label -> rows; without rows that have no label. Empty where answers are tuples.
    missing: labels of the subtask that no row has, where rows have labels at all.
    tuples: the mean number of tuples a row; None where answers are labels.
    """

    subtask: str
    dataset: str
    part: str
    rows: int
    texts: int
    repeats: int
    labels: dict[str, int]
    missing: tuple[str, ...]
    tuples: float | None
    characters: Lengths
    words: Lengths


@dataclass(frozen=True)
class Leak:
    """So many rows of a train or weak part have a text of a data set's test part, or share 36 characters with one."""

    dataset: str
    part: str
    test_dataset: str
    equal: int
    sharing: int


@dataclass(frozen=True)
class Constant:
    """The one answer that scores best on a subtask's training rows, and its score on the test rows."""

    subtask: str
    answer: str
    score: float


def describe(subtasks: Sequence[Subtask], pools: Pools) -> list[SplitStats]:
    """Return what the rows of each subtask, data set and part are like; parts without rows are left out."""
    described = []
    for subtask in subtasks:
        by_dataset: dict[str, dict[str, list[Example]]] = {}
        for part in SOURCE_SPLITS:
            for example in pools[subtask.name][part]:
                by_dataset.setdefault(example.dataset, {}).setdefault(part, []).append(example)
        described += [
            _describe_part(subtask, dataset, part, parts[part])
            for dataset, parts in sorted(by_dataset.items())
            for part in SOURCE_SPLITS
            if part in parts
        ]
    return described


def _describe_part(subtask: Subtask, dataset: str, part: str, rows: Sequence[Example]) -> SplitStats:
    found = Counter(row.gold for row in rows if isinstance(row.gold, str) and row.gold)
    labels = {label: found[label] for label in subtask.labels if label in found}
    return SplitStats(
        subtask=subtask.name,
        dataset=dataset,
        part=part,
        rows=len(rows),
        texts=len({normalised(row.text) for row in rows}),
        repeats=len(rows) - len({row.id for row in rows}),
        labels=labels,
        missing=tuple(label for label in subtask.labels if label not in labels) if labels else (),
        tuples=sum(len(row.gold) for row in rows) / len(rows) if subtask.is_tuple else None,
        characters=lengths_of(len(row.text) for row in rows),
        words=lengths_of(len(row.text.split()) for row in rows),
    )


def lengths_of(lengths: Iterable[int]) -> Lengths:
    """Return the percentiles of at least one length."""
    found = np.array(list(lengths))
    p5, median, p95 = (float(value) for value in np.percentile(found, (5, 50, 95)))
    return Lengths(p5, median, p95, int(found.max()))


def leakage(pools: Pools) -> list[Leak]:
    """Return every pair of a train or weak part and a data set whose test texts occur in it.

    A row whose text equals a test text is not counted again as sharing characters with one of the same data set.
    """
    tests: dict[str, set[str]] = {}
    suspects: dict[tuple[str, str], list[str]] = {}
    for parts in pools.values():
        for example in parts["test"]:
            tests.setdefault(example.dataset, set()).add(normalised(example.text))
        for part in ("train", "weak"):
            for example in parts[part]:
                suspects.setdefault((example.dataset, part), []).append(normalised(example.text))
    every = Blocklist.of(set().union(*tests.values()))
    suspects = {place: _overlapping(every, contents) for place, contents in suspects.items()}
    blocklists = {dataset: Blocklist.of(tests[dataset]) for dataset in sorted(tests)}
    leaks = []
    for (dataset, part), contents in sorted(suspects.items()):
        for test_dataset, blocklist in blocklists.items():
            equal = blocklist.equal(contents)
            sharing = blocklist.sharing(contents) & ~equal
            if equal.any() or sharing.any():
                leaks.append(Leak(dataset, part, test_dataset, int(equal.sum()), int(sharing.sum())))
    return leaks


def _overlapping(blocklist: Blocklist, contents: Sequence[str]) -> list[str]:
    overlapping = blocklist.overlapping(contents)
    return [content for content, overlaps in zip(contents, overlapping, strict=True) if overlaps]


def constants(subtasks: Sequence[Subtask], pools: Pools) -> list[Constant]:
    """Return the best constant answer of each subtask that has training and test rows."""
    return [
        Constant(subtask.name, *best_constant(subtask, pools[subtask.name]["train"], pools[subtask.name]["test"]))
        for subtask in subtasks
        if pools[subtask.name]["train"] and pools[subtask.name]["test"]
    ]
