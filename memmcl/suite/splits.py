"""Train, weak, selection and test rows per subtask: disjoint by content, balanced, the same in every run.

The content of a row is its normalised text (`examples.normalised`). What is drawn depends on hashes of
content alone, never on row order, so added rows do not move the others.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal

from memmcl import seeds
from memmcl.errors import ConfigError, DataError
from memmcl.suite.datasets import read_directory
from memmcl.suite.embedded import read_embedded
from memmcl.suite.examples import Example, normalised
from memmcl.suite.subtasks import get_subtask

PARTS = ("train", "weak", "test")
"""What a source has: the weak part is the pool for weak and selection rows."""

PREPARED_PARTS = ("train", "weak", "selection", "test")

OnOverlap = Literal["error", "drop"]
Pools = dict[str, dict[str, list[Example]]]
"""Subtask -> part of `PARTS` -> rows."""

_TEST_BELOW = 30
_WEAK_BELOW = 50


@dataclass(frozen=True)
class Splits:
    """Rows ready for use.

    parts: subtask -> part of `PREPARED_PARTS` -> rows. Any first k rows of a part are themselves balanced.
    dropped: reason -> number of rows left out for it; reasons that did not occur are absent.
    """

    parts: dict[str, dict[str, tuple[Example, ...]]]
    dropped: dict[str, int]

    def digest(self, subtask: str, part: str) -> str:
        """Return the digest of a part's rows, in their order."""
        return seeds.digest(
            [
                [example.id, example.dataset, example.text, example.gold, dict(example.fields)]
                for example in self.parts[subtask][part]
            ]
        )


def load_splits(
    source: str,
    subtask_names: Sequence[str],
    *,
    train_rows: int | None,
    weak_rows: int,
    selection_rows: int,
    test_rows: int | None,
    on_overlap: OnOverlap = "error",
) -> Splits:
    """Read `source` ("embedded", or a directory in SentiEval's layout) and prepare its splits; see `prepare`.

    Raises:
        ConfigError: an unknown subtask or a negative number of rows.
        DataError: a missing directory, rows that cannot be used, overlapping splits, or an empty part.
    """
    subtasks = [get_subtask(name) for name in subtask_names]
    pools = split_embedded(read_embedded(subtasks)) if source == "embedded" else read_directory(source, subtasks)
    return prepare(
        pools,
        train_rows=train_rows,
        weak_rows=weak_rows,
        selection_rows=selection_rows,
        test_rows=test_rows,
        on_overlap=on_overlap,
    )


def split_embedded(examples_by_subtask: Mapping[str, Sequence[Example]]) -> Pools:
    """Return the parts of rows that come without any: by a hash of content, 30 % test, 20 % weak, 50 % train.

    The hash is that of the text alone, so a sentence that serves several subtasks is in one part for all.
    """
    pools: Pools = {}
    for name, examples in examples_by_subtask.items():
        pools[name] = {part: [] for part in PARTS}
        for example in examples:
            pools[name][_part_of(example.text)].append(example)
    return pools


def _part_of(text: str) -> str:
    bucket = int(hashlib.sha256(normalised(text).encode()).hexdigest(), 16) % 100
    return "test" if bucket < _TEST_BELOW else "weak" if bucket < _WEAK_BELOW else "train"


def prepare(
    splits: Mapping[str, Mapping[str, Sequence[Example]]],
    *,
    train_rows: int | None,
    weak_rows: int,
    selection_rows: int,
    test_rows: int | None,
    on_overlap: OnOverlap = "error",
) -> Splits:
    """Make the parts disjoint by content over all subtasks, then draw so many rows of each (None: all).

    A text in the test part and in the train or weak part of one data set is an error, or dropped from train
    and weak with `on_overlap="drop"`. Otherwise weak rows whose text is in any test part, and train rows
    whose text is in any weak or test part, are dropped. Weak and selection rows come from the weak part and
    share no text either. Rows are drawn in the order of a hash of (data set, content, fields), in turn from
    each data set of the subtask; weak and selection rows also in turn from each label.

    Raises:
        ConfigError: a negative number of rows.
        DataError: overlapping splits, or a part that has no rows (selection rows only where some are wanted).
    """
    caps = {"train": train_rows, "weak": weak_rows, "selection": selection_rows, "test": test_rows}
    for part, cap in caps.items():
        if cap is not None and cap < 0:
            raise ConfigError(f"{part}_rows must not be negative, got {cap}")
    dropped: Counter[str] = Counter()
    pools = {name: {part: _distinct(parts[part], dropped) for part in PARTS} for name, parts in splits.items()}
    for name, pool in pools.items():
        _separate_test(name, pool, on_overlap, dropped)
    _separate_parts(pools, dropped)
    chosen = {
        name: {
            "train": _draw(pool["train"], train_rows, by_label=False),
            "test": _draw(pool["test"], test_rows, by_label=False),
        }
        for name, pool in pools.items()
    }
    _draw_weak(pools, chosen, weak_rows, selection_rows)
    parts = {name: {part: tuple(rows[part]) for part in PREPARED_PARTS} for name, rows in chosen.items()}
    for name, rows in parts.items():
        for part in PREPARED_PARTS:
            if not rows[part] and (part != "selection" or selection_rows):
                raise _empty(name, part, caps[part], len(splits[name][_pool_of(part)]))
    return Splits(parts=parts, dropped=dict(dropped))


def _pool_of(part: str) -> str:
    return "weak" if part == "selection" else part


def _empty(name: str, part: str, cap: int | None, read: int) -> DataError:
    if cap == 0:
        return DataError(f"the {part} part of subtask {name!r} is empty: {part}_rows is 0; ask for at least 1 row")
    return DataError(
        f"the {part} part of subtask {name!r} is empty: its source has {read} {_pool_of(part)} rows, "
        f"none of them left for it; add rows whose text occurs in no other part, or leave the subtask out"
    )


def _distinct(rows: Iterable[Example], dropped: Counter[str]) -> list[Example]:
    """Return the rows in drawing order, one of each id."""
    ordered = sorted(rows, key=_drawing_order)
    kept: dict[str, Example] = {}
    for example in ordered:
        kept.setdefault(example.id, example)
    _count(dropped, "repeated rows of a part", len(ordered) - len(kept))
    return list(kept.values())


def _drawing_order(example: Example) -> tuple[str, str, str]:
    fields = sorted(example.fields.items())
    return seeds.digest([example.dataset, normalised(example.text), fields]), example.text, example.answer


def _separate_test(name: str, pool: dict[str, list[Example]], on_overlap: OnOverlap, dropped: Counter[str]) -> None:
    """Take test texts out of the train and weak rows of the same data set, or refuse."""
    test = {(example.dataset, normalised(example.text)) for example in pool["test"]}
    for part in ("train", "weak"):
        kept: list[Example] = []
        overlapping: list[Example] = []
        for example in pool[part]:
            (overlapping if (example.dataset, normalised(example.text)) in test else kept).append(example)
        if overlapping and on_overlap == "error":
            raise DataError(
                f"overlapping splits: {len(overlapping)} {part} rows of {name!r} have a text of the test "
                f"split of their own data set, as {overlapping[0].text[:40]!r} in {overlapping[0].dataset}; "
                f"remove them from one split, or set data.on_overlap: drop, which drops them from {part}"
            )
        _count(dropped, f"{part} rows whose text is in the test split of their data set", len(overlapping))
        pool[part] = kept


def _separate_parts(pools: Pools, dropped: Counter[str]) -> None:
    """Take the texts of all test parts out of weak and train, and those of all weak parts out of train."""
    test, weak = _contents(pools, "test"), _contents(pools, "weak")
    for pool in pools.values():
        pool["weak"] = _without(pool["weak"], test, "weak rows whose text is in a test part", dropped)
        pool["train"] = _without(pool["train"], test, "train rows whose text is in a test part", dropped)
        pool["train"] = _without(pool["train"], weak, "train rows whose text is in a weak part", dropped)


def _contents(pools: Pools, part: str) -> set[str]:
    return {normalised(example.text) for pool in pools.values() for example in pool[part]}


def _without(rows: list[Example], contents: set[str], reason: str, dropped: Counter[str]) -> list[Example]:
    kept = [example for example in rows if normalised(example.text) not in contents]
    _count(dropped, reason, len(rows) - len(kept))
    return kept


def _count(dropped: Counter[str], reason: str, rows: int) -> None:
    if rows:
        dropped[reason] += rows


def _draw_weak(pools: Pools, chosen: dict[str, dict[str, list[Example]]], weak: int, selection: int) -> None:
    """Draw weak and selection rows from the weak pools so that no text is in both, over all subtasks."""
    weak_texts: set[str] = set()
    selection_texts: set[str] = set()
    for name in sorted(pools):
        pool = pools[name]["weak"]
        free = [example for example in pool if normalised(example.text) not in selection_texts]
        chosen[name]["weak"] = _draw(free, weak, by_label=True)
        weak_texts |= {normalised(example.text) for example in chosen[name]["weak"]}
        rest = [example for example in pool if normalised(example.text) not in weak_texts]
        chosen[name]["selection"] = _draw(rest, selection, by_label=True)
        selection_texts |= {normalised(example.text) for example in chosen[name]["selection"]}


def _draw(rows: Sequence[Example], cap: int | None, *, by_label: bool) -> list[Example]:
    """Return the first `cap` rows, taken in turn from each label (not for tuples) and each data set."""
    labels = _groups(rows, _label) if by_label else [list(rows)]
    in_turn = [_interleave(_groups(group, lambda example: example.dataset)) for group in labels]
    return _interleave(in_turn)[:cap]


def _label(example: Example) -> str:
    return example.gold if isinstance(example.gold, str) else ""


def _groups(rows: Iterable[Example], key: Callable[[Example], str]) -> list[list[Example]]:
    groups: dict[str, list[Example]] = {}
    for example in rows:
        groups.setdefault(key(example), []).append(example)
    return [groups[name] for name in sorted(groups)]


def _interleave(groups: Sequence[Sequence[Example]]) -> list[Example]:
    """Return the first of each group, then the second of each, and so on."""
    return [example for column in zip_longest(*groups) for example in column if example is not None]
