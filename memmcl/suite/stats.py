"""What rows are like: counts, label balance, lengths, leakage, and how far the best constant answer gets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress

import numpy as np

from memmcl.suite.examples import Example, normalised
from memmcl.suite.metrics import best_constant
from memmcl.suite.overlap import Blocklist
from memmcl.suite.sources import SOURCE_SPLITS
from memmcl.suite.subtasks import Subtask

Pools = Mapping[str, Mapping[str, Sequence[Example]]]  # subtask -> split of `sources.SOURCE_SPLITS` -> rows


@dataclass(frozen=True)
class Lengths:
    """The 5th percentile, median, 95th percentile and maximum of the lengths of texts."""

    p5: float
    median: float
    p95: float
    max: int


@dataclass(frozen=True)
class SplitStats:
    """One split (`part`) of one data set.

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
    """How many rows of a train or weak split (`part`) equal a test text of a data set, or share 36 characters."""

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
    """Return what the rows of each subtask, data set and split are like; splits without rows are left out."""
    described = []
    for subtask in subtasks:
        splits = pools[subtask.name]
        for dataset in sorted({example.dataset for rows in splits.values() for example in rows}):
            for split in SOURCE_SPLITS:
                rows = [example for example in splits[split] if example.dataset == dataset]
                described += [_describe_split(subtask, dataset, split, rows)] if rows else []
    return described


def _describe_split(subtask: Subtask, dataset: str, split: str, rows: Sequence[Example]) -> SplitStats:
    counts = Counter(row.gold for row in rows if isinstance(row.gold, str) and row.gold)
    labels = {label: counts[label] for label in subtask.labels if label in counts}
    return SplitStats(
        subtask=subtask.name,
        dataset=dataset,
        part=split,
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
    array = np.array(list(lengths))
    p5, median, p95 = (float(value) for value in np.percentile(array, (5, 50, 95)))
    return Lengths(p5, median, p95, int(array.max()))


def leakage(pools: Pools) -> list[Leak]:
    """Return every pair of a train or weak split and a data set whose test texts occur in it.

    A row whose text equals a test text is not counted again as sharing characters with one of the same data set.
    """
    tests: dict[str, set[str]] = {}
    suspects: dict[tuple[str, str], list[str]] = {}
    for splits in pools.values():
        for example in splits["test"]:
            tests.setdefault(example.dataset, set()).add(normalised(example.text))
        for split in ("train", "weak"):
            for example in splits[split]:
                suspects.setdefault((example.dataset, split), []).append(normalised(example.text))
    every = Blocklist.of(set().union(*tests.values()))
    blocklists = {dataset: Blocklist.of(tests[dataset]) for dataset in sorted(tests)}
    leaks = []
    for (dataset, split), texts in sorted(suspects.items()):
        contents = list(compress(texts, every.overlapping(texts)))
        for test_dataset, blocklist in blocklists.items():
            equal = blocklist.equal(contents)
            sharing = blocklist.sharing(contents) & ~equal
            if equal.any() or sharing.any():
                leaks.append(Leak(dataset, split, test_dataset, int(equal.sum()), int(sharing.sum())))
    return leaks


def constants(subtasks: Sequence[Subtask], pools: Pools) -> list[Constant]:
    """Return the best constant answer of each subtask that has training and test rows."""
    rows = [(subtask, pools[subtask.name]["train"], pools[subtask.name]["test"]) for subtask in subtasks]
    return [Constant(one.name, *best_constant(one, train, test)) for one, train, test in rows if train and test]
