"""Train, weak, selection and test rows per subtask: disjoint by content, balanced, the same in every run.

The content of a row is its normalised text (`examples.normalised`). What is drawn depends on hashes of
content alone, never on row order, so added rows do not move the others. No train or weak row of any subtask
repeats a test text of any subtask, nor shares a window of 36 normalised characters with one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby, zip_longest
from typing import Any, Literal, NamedTuple

from memmcl import seeds
from memmcl.errors import ConfigError, DataError
from memmcl.suite.examples import Example, drawing_order, normalised
from memmcl.suite.faults import Fault, Faults
from memmcl.suite.overlap import WINDOW, Blocklist
from memmcl.suite.sources import EMBEDDED, Reading, read_sources
from memmcl.suite.subtasks import Subtask

SPLITS = ("train", "weak", "selection", "test")

OnOverlap = Literal["error", "drop"]
OnError = Literal["fail", "skip"]

_SHOWN_FAULTS = 5


class _Row(NamedTuple):
    """An example and its content."""

    example: Example
    content: str


_Pools = dict[str, dict[str, list[_Row]]]  # subtask -> split of `sources.SOURCE_SPLITS` -> rows


@dataclass(frozen=True)
class Splits:
    """Rows ready for use.

    parts: subtask -> split of `SPLITS` -> rows. Any first k rows of a split are themselves balanced.
    dropped: reason -> number of rows left out for it; reasons that did not occur are absent.
    faults: the first 1000 rows that cannot be used and were skipped.
    warnings: the first 1000 rows that are used although something about them is odd.
    subtasks: those of the rows, by name; their questions belong to the digests.
    """

    parts: dict[str, dict[str, tuple[Example, ...]]]
    dropped: dict[str, int]
    faults: tuple[Fault, ...] = ()
    warnings: tuple[Fault, ...] = ()
    subtasks: Mapping[str, Subtask] = field(default_factory=dict)

    def digest(self, subtask: str, split: str) -> str:
        """Return the digest of a split's rows, in their order, and of their question."""
        return digest_of(self.parts[subtask][split], self.subtasks.get(subtask))


def digest_of(rows: Sequence[Example], subtask: Subtask | None) -> str:
    """Return the digest of rows, in their order, and of their question: all of the subtask but its title."""
    values = [[row.id, row.dataset, row.text, row.gold, dict(row.fields)] for row in rows]
    question = asdict(subtask) if subtask is not None else {}
    return seeds.digest([{name: value for name, value in question.items() if name != "title"}, values])


def load_splits(
    subtasks: Sequence[Subtask],
    reading: Reading = EMBEDDED,
    *,
    train_rows: int | None,
    weak_rows: int,
    selection_rows: int,
    test_rows: int | None,
    on_overlap: OnOverlap = "error",
    on_error: OnError = "fail",
) -> Splits:
    """Read the rows of `subtasks` (see `sources.read_sources`) and prepare their splits (see `prepare`).

    on_error: with "skip", rows that cannot be used are left out and counted; with "fail" they are an error.

    Raises:
        ConfigError: a negative number of rows.
        DataError: data that is missing, rows that cannot be used, overlapping splits, or an empty split.
    """
    read = read_sources(subtasks, reading)
    if len(read.faults) and on_error == "fail":
        raise _unusable(read.faults)
    splits = prepare(
        read.pools,
        train_rows=train_rows,
        weak_rows=weak_rows,
        selection_rows=selection_rows,
        test_rows=test_rows,
        on_overlap=on_overlap,
        weak_labels=reading.weak_labels,
    )
    skipped = {f"rows that cannot be used: {kind}": rows for kind, rows in sorted(read.faults.counts.items())}
    return replace(
        splits,
        dropped=dict(Counter(skipped) + read.dropped + Counter(splits.dropped)),
        faults=tuple(read.faults.first),
        warnings=tuple(read.faults.warnings),
        subtasks={subtask.name: subtask for subtask in subtasks},
    )


def _unusable(faults: Faults) -> DataError:
    kinds = ", ".join(f"{rows} {kind}" for kind, rows in faults.counts.most_common())
    shown = "; ".join(str(fault) for fault in faults.first[:_SHOWN_FAULTS])
    first = f"the first {_SHOWN_FAULTS}: " if len(faults) > _SHOWN_FAULTS else ""
    return DataError(
        f"rows that cannot be used: {len(faults)} ({kinds}): {first}{shown}; correct them, or set "
        f"data.on_error: skip; `memmcl data check` lists all"
    )


def prepare(
    splits: Mapping[str, Mapping[str, Sequence[Example]]],
    *,
    train_rows: int | None,
    weak_rows: int,
    selection_rows: int,
    test_rows: int | None,
    on_overlap: OnOverlap = "error",
    weak_labels: bool = True,
) -> Splits:
    """Make the splits disjoint by content over all subtasks, then draw so many rows of each (None: all).

    A text in the test split and in the train or weak split of one data set is an error, or dropped from train
    and weak with `on_overlap="drop"`. Otherwise train and weak rows whose text is in any test split or shares
    `WINDOW` characters with one, and train rows whose text is in any weak split, are dropped. Weak and
    selection rows come from the weak split and share no text either. Rows are drawn in the order of a hash of
    (data set, content, fields), in turn from each data set of the subtask; weak and selection rows also in
    turn from each label, unless `weak_labels` is false. Repeated rows count once, but in the test split, where
    published scores count each.

    Raises:
        ConfigError: a negative number of rows.
        DataError: overlapping splits, or a split that has no rows (selection rows only where some are wanted).
    """
    caps = {"train": train_rows, "weak": weak_rows, "selection": selection_rows, "test": test_rows}
    for split, cap in caps.items():
        if cap is not None and cap < 0:
            raise ConfigError(f"{split}_rows must not be negative, got {cap}")
    dropped: Counter[str] = Counter()
    pools = {name: {split: _ordered(rows) for split, rows in pool.items()} for name, pool in splits.items()}
    for name, pool in pools.items():
        for split in ("train", "weak"):
            first: dict[str, _Row] = {}
            repeats = [first.setdefault(row.example.id, row) is not row for row in pool[split]]
            pool[split] = _without(pool[split], repeats, "repeated rows of a part", dropped)
        _separate_test(name, pool, on_overlap, dropped)
    _separate_splits(pools, dropped)
    chosen = {
        name: {split: _draw(pool[split], caps[split], by_label=False) for split in ("train", "test")}
        for name, pool in pools.items()
    }
    _draw_weak(pools, chosen, weak_rows, selection_rows, by_label=weak_labels)
    prepared = {
        name: {split: tuple(row.example for row in rows[split]) for split in SPLITS} for name, rows in chosen.items()
    }
    for name, examples in prepared.items():
        for split in SPLITS:
            if not examples[split] and (split != "selection" or selection_rows):
                raise _empty(name, split, caps[split], splits[name])
    return Splits(parts=prepared, dropped=dict(dropped))


def _empty(name: str, split: str, cap: int | None, read: Mapping[str, Sequence[Example]]) -> DataError:
    source = "weak" if split == "selection" else split
    reason = f"its source has {len(read[source])} usable {source} rows, none of them left for it"
    advice = "add rows that share no text with another split, or leave the subtask out"
    if cap == 0:
        reason, advice = f"{split}_rows is 0", "ask for at least 1 row"
    return DataError(f"the {split} split of subtask {name!r} is empty: {reason}; {advice}")


def _ordered(examples: Iterable[Example]) -> list[_Row]:
    """Return the rows in drawing order."""
    return [_Row(example, normalised(example.text)) for example in sorted(examples, key=drawing_order)]


def _separate_test(name: str, pool: dict[str, list[_Row]], on_overlap: OnOverlap, dropped: Counter[str]) -> None:
    """Take test texts out of the train and weak rows of the same data set, or refuse."""
    test = {(row.example.dataset, row.content) for row in pool["test"]}
    for split in ("train", "weak"):
        overlaps = [(row.example.dataset, row.content) in test for row in pool[split]]
        if any(overlaps) and on_overlap == "error":
            first = pool[split][overlaps.index(True)].example
            raise DataError(
                f"overlapping splits: {sum(overlaps)} {split} rows of {name!r} have a text of the test "
                f"split of their own data set, as {first.text[:40]!r} in {first.dataset}; "
                f"remove them from one split, or set data.on_overlap: drop, which drops them from {split}"
            )
        reason = f"{split} rows whose text is in the test split of their data set"
        pool[split] = _without(pool[split], overlaps, reason, dropped)


def _separate_splits(pools: _Pools, dropped: Counter[str]) -> None:
    """Take what overlaps with any test split out of weak and train, and the texts of all weak splits out of train."""
    test, weak = Blocklist.of(_contents(pools, "test")), _contents(pools, "weak")
    for pool in pools.values():
        for split in ("weak", "train"):
            equal = test.equal([row.content for row in pool[split]])
            rows = _without(pool[split], equal, f"{split} rows whose text is in a test part", dropped)
            sharing = test.sharing([row.content for row in rows])
            reason = f"{split} rows that share {WINDOW} characters with a test text"
            pool[split] = _without(rows, sharing, reason, dropped)
        in_weak = [row.content in weak for row in pool["train"]]
        pool["train"] = _without(pool["train"], in_weak, "train rows whose text is in a weak part", dropped)


def _contents(pools: _Pools, split: str) -> set[str]:
    return {row.content for pool in pools.values() for row in pool[split]}


def _without(rows: list[_Row], unwanted: Iterable[Any], reason: str, dropped: Counter[str]) -> list[_Row]:
    """Return the rows that are not `unwanted` (a flag per row), and count the others under `reason`.

    Reasons are stored in runs and belong to their keys: their wording never changes.
    """
    kept = [row for row, is_unwanted in zip(rows, unwanted, strict=True) if not is_unwanted]
    if len(kept) < len(rows):
        dropped[reason] += len(rows) - len(kept)
    return kept


def _draw_weak(pools: _Pools, chosen: _Pools, weak: int, selection: int, *, by_label: bool) -> None:
    """Draw weak and selection rows from the weak pools so that no text is in both, over all subtasks."""
    weak_texts: set[str] = set()
    selection_texts: set[str] = set()
    for name in sorted(pools):
        pool = pools[name]["weak"]
        free = [row for row in pool if row.content not in selection_texts]
        chosen[name]["weak"] = _draw(free, weak, by_label=by_label)
        weak_texts |= {row.content for row in chosen[name]["weak"]}
        rest = [row for row in pool if row.content not in weak_texts]
        chosen[name]["selection"] = _draw(rest, selection, by_label=by_label)
        selection_texts |= {row.content for row in chosen[name]["selection"]}


def _draw(rows: Sequence[_Row], cap: int | None, *, by_label: bool) -> list[_Row]:
    """Return the first `cap` rows, taken in turn from each label (not for tuples) and each data set."""
    labels = [list(rows)]
    if by_label:
        labels = _groups(rows, lambda row: row.example.gold if isinstance(row.example.gold, str) else "")
    in_turn = [_interleave(_groups(group, lambda row: row.example.dataset)) for group in labels]
    return _interleave(in_turn)[:cap]


def _groups(rows: Iterable[_Row], key: Callable[[_Row], str]) -> list[list[_Row]]:
    return [list(group) for _, group in groupby(sorted(rows, key=key), key)]


def _interleave(groups: Sequence[Sequence[_Row]]) -> list[_Row]:
    """Return the first of each group, then the second of each, and so on."""
    return [row for column in zip_longest(*groups) for row in column if row is not None]
