"""Reads rows wherever they lie: `read_sources` returns pools of examples, and what is wrong with other rows."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from memmcl.errors import DataError
from memmcl.suite import hub
from memmcl.suite.embedded import corpus_rows
from memmcl.suite.examples import Example, normalised
from memmcl.suite.faults import Fault, Faults
from memmcl.suite.files import read_files
from memmcl.suite.pool import Pool
from memmcl.suite.rows import Row, Shape, example_of, text_of, usable
from memmcl.suite.sentieval import find_folders
from memmcl.suite.subtasks import Subtask

SOURCE_SPLITS = ("train", "weak", "test")
"""The splits of a source; its weak split is the pool for weak and selection rows."""

_TEST_BELOW = 30
_WEAK_BELOW = 50
_WEAK_OF_TRAIN_BELOW = 20


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the rows of one subtask lie: one place for all of them, a place per split, or a Hugging Face data set.

    The fields are those of `memmcl.config.SourceConfig`. `split_of` decides the split of each row in `path`. Without
    `weak`, the fifth of the training rows whose content hash is lowest is the weak split.
    """

    path: str | None = None
    train: str | None = None
    weak: str | None = None
    test: str | None = None
    dataset: str | None = None
    subset: str | None = None
    revision: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Where rows are read from, and how.

    source: "embedded", or a directory or URL in SentiEval's layout.
    sources: subtask -> where its rows lie, when not in `source`.
    pool_rows: so many rows of each data set and split are kept at most, the first in drawing order. Repeated rows are
        looked for among those: in train and weak they are faults, in a test split that was read as such warnings.
    max_characters: a longer text is a fault.
    weak_labels: False for weak rows that need no label; their gold is then "" or ().
    storage: options of the S3 file system.
    """

    source: str = "embedded"
    sources: Mapping[str, Source] = field(default_factory=dict)
    pool_rows: int = 20_000
    max_characters: int = 20_000
    weak_labels: bool = True
    storage: Mapping[str, Any] | None = None


EMBEDDED = Reading()  # the corpus that ships with memmcl


@dataclass(frozen=True)
class RowPools:
    """What was read.

    pools: subtask -> split of `SOURCE_SPLITS` -> examples, data set by data set, in drawing order.
    faults: rows that are in no pool because of what is wrong with them.
    dropped: reason -> number of sound rows that are in no pool.
    """

    pools: dict[str, dict[str, list[Example]]]
    faults: Faults
    dropped: Counter[str]


SplitOf = Callable[[str], str]  # from a text to its split


@dataclass(frozen=True)
class _Feed:
    """Rows of one data set.

    published: whether the source itself has a test split, instead of one that we choose. file: tells files apart whose
    common rows are one row; see `Pool.add`.
    """

    dataset: str
    split_of: SplitOf
    rows: Iterable[Row | Fault]
    published: bool
    file: str = ""


def split_of(text: str) -> str:
    """Return the split of a text whose source has none: by a hash of its content, 30 % test, 20 % weak, else train.

    The hash is that of the text alone, so a sentence that serves several subtasks is in one split for all.
    """
    bucket = _bucket(text)
    return "test" if bucket < _TEST_BELOW else "weak" if bucket < _WEAK_BELOW else "train"


def _bucket(text: str) -> int:
    return int(hashlib.sha256(normalised(text).encode()).hexdigest(), 16) % 100


def read_sources(subtasks: Sequence[Subtask], reading: Reading = EMBEDDED, *, faults: Faults | None = None) -> RowPools:
    """Read the rows of `subtasks` in a stream; what is wrong with a row becomes a fault and is never raised.

    faults: where faults are added as they occur; they are in the result too.

    Raises:
        DataError: no such place, no access to it, or no data set for a subtask.
    """
    faults = Faults() if faults is None else faults
    dropped: Counter[str] = Counter()
    pools: dict[str, dict[str, list[Example]]] = {}
    for subtask in subtasks:
        source = reading.sources.get(subtask.name)
        own = source or Source()
        shape = Shape(columns=own.columns, labels=own.labels, max_characters=reading.max_characters)
        if source is not None:
            feeds = _of_source(source, subtask, shape, reading.storage)
        elif reading.source == "embedded":
            rows = corpus_rows(subtask)
            feeds = iter([_Feed(f"embedded_{subtask.name}", split_of, rows, published=False)])
        else:
            feeds = _of_directory(reading.source, subtask, reading.storage)
        by_dataset: dict[tuple[str, str], Pool] = {}
        for feed in feeds:
            read = partial(_read, feed, subtask, shape, weak_labels=reading.weak_labels)
            for row, (split, example) in usable(feed.rows, read, faults):
                key = feed.dataset, split
                if key not in by_dataset:
                    repeats = feed.published and split == "test"
                    by_dataset[key] = Pool(reading.pool_rows, keep_repeats=repeats, faults=faults, dropped=dropped)
                by_dataset[key].add(example, row.place, feed.file)
        pools[subtask.name] = {split: [] for split in SOURCE_SPLITS}
        for (_, split), pool in by_dataset.items():
            pools[subtask.name][split] += pool.rows()
    return RowPools(pools, faults, dropped)


def _read(feed: _Feed, subtask: Subtask, shape: Shape, row: Row, *, weak_labels: bool) -> tuple[str, Example]:
    split = feed.split_of(text_of(row, shape))
    return split, example_of(row, subtask, feed.dataset, shape, labelled=weak_labels or split != "weak")


def _of_directory(root: str, subtask: Subtask, storage: Mapping[str, Any] | None) -> Iterator[_Feed]:
    for folder in find_folders(root, subtask, storage):
        for split, paths in folder.files.items():
            for path in paths:
                file = path if folder.sampled else ""
                rows = folder.rows(path, subtask)
                yield _Feed(folder.dataset, _split_of(split, folder.files), rows, published=True, file=file)


def _of_source(source: Source, subtask: Subtask, shape: Shape, storage: Mapping[str, Any] | None) -> Iterator[_Feed]:
    columns = shape.needed(subtask)
    if source.path is not None:
        rows: Iterable[Row | Fault] = read_files(source.path, columns=columns, storage=storage)
        yield _Feed(subtask.name, split_of, rows, published=False)
        return
    places = {split: place for split in SOURCE_SPLITS if (place := getattr(source, split)) is not None}
    hub_set: Mapping[str, Any] = {}
    if source.dataset is not None:
        hub_set = hub.load(source.dataset, source.subset, source.revision)
        places = {split: theirs for split, theirs in hub.SPLITS.items() if theirs in hub_set} | places
    missing = [split for split in ("train", "test") if split not in places]
    if missing:
        advice = (
            f"name one of its splits ({', '.join(sorted(hub_set))})"
            if hub_set
            else "name a file, or give all rows as path"
        )
        raise DataError(
            f"the source of subtask {subtask.name!r} has no {' and no '.join(missing)} rows; "
            f"add {' and '.join(f'{split}:' for split in missing)} to it: {advice}"
        )
    for split, place in places.items():
        if source.dataset is not None:
            rows = hub.rows(source.dataset, place, hub_set)
        else:
            rows = read_files(place, columns=columns, storage=storage)
        yield _Feed(subtask.name, _split_of(split, places), rows, published=True)


def _split_of(split: str, splits: Collection[str]) -> SplitOf:
    """Return the split of each text in the files of `split`; without weak rows, training rows serve as such too."""
    if split == "train" and "weak" not in splits:
        return lambda text: "weak" if _bucket(text) < _WEAK_OF_TRAIN_BELOW else "train"
    return lambda _: split
