"""A user's own file of weak rows: rows of subtasks side by side, and pairs of a prompt and its answer.

    {"subtask": "sent2", "text": "...", "label": "positive"}     a row of a subtask, with what its question needs
    {"prompt": "...", "answer": "..."}                           shown to the model to the last character
    {..., "expert": "mine"}                                      either of them, with the expert it is for

Rows of the same subtask and expert are scored together. Where labels are not needed, a row of a subtask
may lack it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from memmcl.errors import DataError, short
from memmcl.suite.examples import Example
from memmcl.suite.faults import Faults
from memmcl.suite.files import read_files
from memmcl.suite.pool import Pool
from memmcl.suite.rows import Row, RowError, Shape, example_of, storable, text_of, usable
from memmcl.suite.subtasks import PAIRS, Subtask
from memmcl.urls import public

SHOWN_FAULTS = 3
_PAIR = ("prompt", "answer")


@dataclass(frozen=True)
class WeakRows:
    """Rows that are scored together: those of one subtask (or all pairs) that are for the same expert.

    name: that of the subtask, followed by `:EXPERT` where rows name one. expert: the one that the rows name, or that is
    called like the subtask; None for neither.
    """

    name: str
    subtask: Subtask
    expert: str | None
    rows: tuple[Example, ...]


def read_weak_rows(
    url: str,
    *,
    catalogue: Mapping[str, Subtask],
    experts: Collection[str],
    max_characters: int = 20_000,
    storage: Mapping[str, Any] | None = None,
    labelled: bool = True,
) -> list[WeakRows]:
    """Return the rows of the file(s) at `url` (JSONL, CSV or Parquet), by name; each group in drawing order.

    catalogue: the subtasks that rows may name. storage: options of the S3 file system. labelled: False for rows of
    subtasks that need no label; their gold is then "" or ().

    Raises:
        DataError: no such file, no row in it, or rows that cannot be used; the first of them are named.
    """
    faults = Faults()
    shape = Shape(max_characters=max_characters)
    pools: dict[tuple[str, str | None], Pool] = defaultdict(
        lambda: Pool(1 << 60, keep_repeats=False, faults=faults, dropped=Counter())
    )

    def read(row: Row) -> tuple[tuple[str, str | None], Example]:
        subtask, expert = _subtask(row, catalogue), row.values.get("expert")
        if expert is not None and not (isinstance(expert, str) and expert in experts):
            raise RowError("missing value", f"unknown expert {short(expert)}; the experts are {', '.join(experts)}")
        if subtask is PAIRS:
            return (subtask.name, expert), _pair(row, shape)
        return (subtask.name, expert), example_of(row, subtask, subtask.name, shape, labelled=labelled)

    for row, (key, example) in usable(read_files(url, storage=storage), read, faults):
        pools[key].add(example, row.place)
    if len(faults):
        shown = "; ".join(str(fault) for fault in faults.first[:SHOWN_FAULTS])
        raise DataError(f"rows that cannot be used: {len(faults)}, first {shown}")
    if not pools:
        raise DataError(f"{public(url)} has no rows; expected rows of subtasks, or pairs of prompt and answer")
    known = {PAIRS.name: PAIRS, **catalogue}
    groups = []
    for (name, expert), pool in pools.items():
        title = f"{name}:{expert}" if expert else name
        for_expert = expert or (name if name in experts else None)
        groups.append(WeakRows(title, known[name], for_expert, tuple(pool.rows())))
    return sorted(groups, key=lambda group: group.name)


def _subtask(row: Row, catalogue: Mapping[str, Subtask]) -> Subtask:
    name = row.values.get("subtask")
    if name is None:
        if all(row.values.get(column) is not None for column in _PAIR):
            return PAIRS
        raise RowError("missing column", "expected a subtask, or a prompt and its answer; add them, or remove the row")
    if not isinstance(name, str) or name not in catalogue:
        raise RowError(
            "missing value",
            f"unknown subtask {short(name)}; known ones: {', '.join(catalogue)}; your own go under data.custom",
        )
    return catalogue[name]


def _pair(row: Row, shape: Shape) -> Example:
    answer = row.values["answer"]
    if not isinstance(answer, str) or not answer:
        raise RowError("missing value", f"'answer' must be a non-empty string, got {short(answer)}; correct the row")
    prompt = text_of(row, Shape(columns={"text": "prompt"}, max_characters=shape.max_characters))
    return Example.create(PAIRS.name, prompt, storable(answer, "answer"))
