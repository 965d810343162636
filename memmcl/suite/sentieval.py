"""SentiEval's layout by URL: GROUP/DATASET with our JSONL files, or with CSV files as they were published.

ROOT/sc/mr/train.jsonl, dev.jsonl, test.jsonl                  JSONL; dev is the weak split, and may be missing
ROOT/sc/mr/test.csv, shot_5/seed_42/train.csv, ...             CSV; all shots together are the training rows
ROOT/sc/mr/test.csv, train.csv, dev.csv                        CSV; train.csv is used instead of shots
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from memmcl.errors import DataError, short, shown
from memmcl.files.places import name_of, open_place, reading
from memmcl.suite.faults import Fault
from memmcl.suite.files import read_file
from memmcl.suite.parsing import read_literal
from memmcl.suite.rows import Row
from memmcl.suite.subtasks import GROUPS, Subtask
from memmcl.urls import public

_STEMS = {"train": "train", "weak": "dev", "test": "test"}
"""Split -> name of its file. SentiEval's dev rows are the pool that weak sets are drawn from."""


@dataclass(frozen=True)
class Folder:
    """The files of one data set, by split; `weak` is empty where training rows have to serve."""

    dataset: str
    fs: Any
    files: Mapping[str, tuple[str, ...]]
    sampled: bool

    def rows(self, path: str, subtask: Subtask) -> Iterator[Row | Fault]:
        """Yield the rows of one of the files, columns named as ours. Raises DataError if it cannot be read."""
        rows = read_file(self.fs, path, name_of(self.fs, path))
        if not path.endswith(".csv"):
            return rows
        return (_as_ours(row, subtask) if isinstance(row, Row) else row for row in rows)


def find_folders(root: str, subtask: Subtask, storage: Mapping[str, Any] | None = None) -> list[Folder]:
    """Return the data sets of `subtask` below `root`; one that is missing is left out if there is another.

    root: the directory or URL that holds the groups' folders (sc, absa, mast), or `data` with them.

    Raises:
        DataError: no such place, no data set for the subtask, or a data set without its files.
    """
    with reading(root):
        fs, path = open_place(root, storage)
        path = path.rstrip("/")
        if not fs.isdir(path):
            raise DataError(
                f"data.source {shown(public(root))} is not a directory; give one in SentiEval's layout, or 'embedded'"
            )
        if not _has_groups(fs, path) and _has_groups(fs, f"{path}/data"):
            path = f"{path}/data"
        names = [f"{subtask.group.lower()}/{dataset}" for dataset in subtask.datasets]
        present = [name for name in names if fs.isdir(f"{path}/{name}")]
        if not present:
            raise DataError(
                f"no data set for subtask {shown(subtask.name)} under {name_of(fs, path)}: expected at least one of "
                f"{', '.join(names)}; add one, or leave the subtask out"
            )
        return [_folder(fs, f"{path}/{name}") for name in present]


def _has_groups(fs: Any, path: str) -> bool:
    return any(fs.isdir(f"{path}/{group.lower()}") for group in GROUPS)


def _folder(fs: Any, path: str) -> Folder:
    names = {str(name).rstrip("/").rsplit("/", 1)[-1] for name in fs.ls(path, detail=False)}
    ending = next((end for end in ("jsonl", "csv") if any(f"{stem}.{end}" in names for stem in _STEMS.values())), "")
    files: dict[str, tuple[str, ...]] = {
        split: (f"{path}/{stem}.{ending}",) for split, stem in _STEMS.items() if f"{stem}.{ending}" in names
    }
    sampled = ending == "csv" and "train" not in files
    if sampled:
        shots = sorted(str(name) for name in fs.glob(f"{path}/shot_*/seed_*/train.csv"))
        files |= {"train": tuple(shots)} if shots else {}
    missing = [split for split in ("train", "test") if split not in files]
    if missing:
        raise DataError(
            f"{name_of(fs, path)} has no {' and no '.join(missing)} rows: every data set folder needs train.jsonl and "
            f"test.jsonl, or test.csv and either train.csv or shot_*/seed_*/train.csv: add the file"
        )
    return Folder(path.rsplit("/", 1)[-1], fs, files, sampled)


def _as_ours(row: Row, subtask: Subtask) -> Row | Fault:
    """Give the columns of a published CSV file our names; columns that have them already stay."""
    values = dict(row.values)
    if "label_text" in values:
        values["label"] = values["label_text"]
    if "target" in subtask.needs and "domain" in values:
        values.setdefault("target", values["domain"])
    if "object_a" in subtask.needs and "object_a" not in values and "tuple" in values:
        text = values["tuple"]  # as ['Java', 'Python', 'worse']: two objects and the answer
        read = read_literal(text)
        if not isinstance(read, list | tuple) or len(read) != 3 or not all(isinstance(item, str) for item in read):
            message = f"expected ['object a', 'object b', 'answer'], got {short(text)}; correct it"
            return Fault(row.place, "broken tuples", message)
        values |= {"object_a": read[0], "object_b": read[1]}
    return Row(row.place, values)
