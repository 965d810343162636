"""The one door to rows: whatever they lie in, `read_sources` returns pools of examples and the faults it met."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from memmcl.errors import DataError
from memmcl.suite import hub
from memmcl.suite.embedded import read_embedded
from memmcl.suite.examples import Example, normalised
from memmcl.suite.faults import Fault, Faults
from memmcl.suite.files import read_files
from memmcl.suite.pool import Pool
from memmcl.suite.rows import Row, RowError, Shape, example_of, text_of
from memmcl.suite.sentieval import find_folders
from memmcl.suite.subtasks import Subtask

PARTS = ("train", "weak", "test")
"""What a source has: the weak part is the pool for weak and selection rows."""

_TEST_BELOW = 30
_WEAK_BELOW = 50
_WEAK_OF_TRAIN_BELOW = 20


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the rows of one subtask lie: one place for all of them, a place per part, or a Hugging Face data set.

    path: file(s) of all rows, as a path, glob or URL; `part_of` deals them to the parts.
    train, weak, test: file(s) of one part; with `dataset`, the name of that split. Without weak, the fifth of the
        training rows whose content hash is lowest is the weak part.
    dataset, subset, revision: a Hugging Face data set by name or directory, its configuration, and its version.
    columns: our field -> their column.
    labels: their label, as text -> ours.
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


@dataclass(frozen=True)
class RowPools:
    """What was read.

    pools: subtask -> part of `PARTS` -> examples, data set by data set, in drawing order.
    faults: rows that are in no pool because of what is wrong with them.
    dropped: reason -> number of sound rows that are in no pool.
    """

    pools: dict[str, dict[str, list[Example]]]
    faults: Faults
    dropped: Counter[str]


Divide = Callable[[str], str]
"""From a text to its part."""


@dataclass(frozen=True)
class _Feed:
    """Rows of one data set. `file` tells files apart whose common rows are one row; see `Pool.add`."""

    dataset: str
    divide: Divide
    rows: Iterable[Row | Fault]
    own_test: bool
    file: str = ""


def part_of(text: str) -> str:
    """Return the part of a text whose source has no parts: by a hash of its content, 30 % test, 20 % weak, else train.

    The hash is that of the text alone, so a sentence that serves several subtasks is in one part for all.
    """
    bucket = _bucket(text)
    return "test" if bucket < _TEST_BELOW else "weak" if bucket < _WEAK_BELOW else "train"


def _train_or_weak(text: str) -> str:
    return "weak" if _bucket(text) < _WEAK_OF_TRAIN_BELOW else "train"


def _bucket(text: str) -> int:
    return int(hashlib.sha256(normalised(text).encode()).hexdigest(), 16) % 100


def read_sources(
    subtasks: Sequence[Subtask],
    *,
    source: str = "embedded",
    sources: Mapping[str, Source] | None = None,
    pool_rows: int = 20_000,
    max_characters: int = 20_000,
    weak_labels: bool = True,
    storage: Mapping[str, Any] | None = None,
    faults: Faults | None = None,
) -> RowPools:
    """Read the rows of `subtasks` in a stream; what is wrong with a row becomes a fault and is never raised.

    source: "embedded", or a directory or URL in SentiEval's layout.
    sources: subtask -> where its rows lie, when not in `source`.
    pool_rows: so many rows of each data set and part are kept at most, the first in drawing order. Repeated rows are
        found among those: in train and weak they are faults, in a test part that a source has of its own warnings.
    max_characters: a longer text is a fault.
    weak_labels: False for weak rows that need no label; their gold is then "" or ().
    storage: options of the S3 file system.
    faults: where faults go, for whoever wants to see each as it is found; they are in the result too.

    Raises:
        DataError: no such place, no access to it, or no data set for a subtask.
    """
    faults = Faults() if faults is None else faults
    dropped: Counter[str] = Counter()
    pools: dict[str, dict[str, list[Example]]] = {}
    for subtask in subtasks:
        given = (sources or {}).get(subtask.name)
        intake = _Intake(
            subtask,
            Shape(
                columns=given.columns if given else {},
                labels=given.labels if given else {},
                max_characters=max_characters,
            ),
            pool_rows=pool_rows,
            weak_labels=weak_labels,
            faults=faults,
            dropped=dropped,
        )
        if given is not None:
            feeds = _of_source(given, subtask, intake.shape, storage)
        elif source == "embedded":
            feeds = _of_corpus(subtask)
        else:
            feeds = _of_directory(source, subtask, storage)
        for feed in feeds:
            intake.take(feed)
        pools[subtask.name] = intake.parts()
    return RowPools(pools, faults, dropped)


class _Intake:
    """Makes examples of the rows of one subtask and pools them by data set and part."""

    def __init__(
        self,
        subtask: Subtask,
        shape: Shape,
        *,
        pool_rows: int,
        weak_labels: bool,
        faults: Faults,
        dropped: Counter[str],
    ) -> None:
        self.subtask = subtask
        self.shape = shape
        self._pool_rows = pool_rows
        self._weak_labels = weak_labels
        self._faults = faults
        self._dropped = dropped
        self._pools: dict[tuple[str, str], Pool] = {}

    def take(self, feed: _Feed) -> None:
        """Read a feed to its end."""
        for row in feed.rows:
            if isinstance(row, Fault):
                self._faults.add(row)
                continue
            try:
                part = feed.divide(text_of(row, self.shape))
                example = self._example(row, feed.dataset, labelled=self._weak_labels or part != "weak")
            except RowError as error:
                self._faults.add(row.fault(error))
                continue
            self._pool(feed, part).add(example, row.place, feed.file)

    def parts(self) -> dict[str, list[Example]]:
        """Return part -> examples."""
        rows: dict[str, list[Example]] = {part: [] for part in PARTS}
        for (_, part), pool in self._pools.items():
            rows[part] += pool.rows()
        return rows

    def _example(self, row: Row, dataset: str, *, labelled: bool) -> Example:
        return example_of(row, self.subtask, dataset, self.shape, labelled=labelled)

    def _pool(self, feed: _Feed, part: str) -> Pool:
        if (feed.dataset, part) not in self._pools:
            self._pools[feed.dataset, part] = Pool(
                self._pool_rows,
                keep_repeats=feed.own_test and part == "test",
                faults=self._faults,
                dropped=self._dropped,
            )
        return self._pools[feed.dataset, part]


def _of_corpus(subtask: Subtask) -> Iterator[_Feed]:
    found = read_embedded([subtask])[subtask.name]
    rows = (
        Row(
            f"corpus, {subtask.name}, {example.text[:40]!r}",
            {
                "text": example.text,
                **example.fields,
                "label": example.gold if isinstance(example.gold, str) else list(example.gold),
            },
        )
        for example in found
    )
    yield _Feed(f"embedded_{subtask.name}", part_of, rows, own_test=False)


def _of_directory(root: str, subtask: Subtask, storage: Mapping[str, Any] | None) -> Iterator[_Feed]:
    for folder in find_folders(root, subtask, storage):
        for part, paths in folder.files.items():
            divide = _only(part) if part != "train" or "weak" in folder.files else _train_or_weak
            for path in paths:
                rows = folder.rows(path, subtask)
                yield _Feed(folder.dataset, divide, rows, own_test=True, file=path if folder.sampled else "")


def _of_source(given: Source, subtask: Subtask, shape: Shape, storage: Mapping[str, Any] | None) -> Iterator[_Feed]:
    columns = shape.needed(subtask)
    if given.path is not None:
        rows: Iterable[Row | Fault] = read_files(given.path, columns=columns, storage=storage)
        yield _Feed(subtask.name, part_of, rows, own_test=False)
        return
    places = {part: place for part in PARTS if (place := getattr(given, part)) is not None}
    found: Mapping[str, Any] = {}
    if given.dataset is not None:
        found = hub.load(given.dataset, given.subset, given.revision)
        places = {part: split for part, split in hub.SPLITS.items() if split in found} | places
    _check_places(subtask, places, sorted(found))
    for part, place in places.items():
        if given.dataset is not None:
            rows = hub.rows(given.dataset, place, found)
        else:
            rows = read_files(place, columns=columns, storage=storage)
        divide = _only(part) if part != "train" or "weak" in places else _train_or_weak
        yield _Feed(subtask.name, divide, rows, own_test=True)


def _check_places(subtask: Subtask, places: Mapping[str, str], splits: Sequence[str]) -> None:
    """Refuse a source without training or test rows.

    Raises:
        DataError: one of them is missing.
    """
    missing = [part for part in ("train", "test") if part not in places]
    if missing:
        advice = f"name one of its splits ({', '.join(splits)})" if splits else "name a file, or give all rows as path"
        raise DataError(
            f"the source of subtask {subtask.name!r} has no {' and no '.join(missing)} rows; "
            f"add {' and '.join(f'{part}:' for part in missing)} to it: {advice}"
        )


def _only(part: str) -> Divide:
    return lambda _: part
