"""Rows of a Hugging Face data set: by its name, or from a directory that `save_to_disk` or a download left."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from memmcl.errors import DataError
from memmcl.suite.rows import Row

SPLITS = {"train": "train", "weak": "validation", "test": "test"}
"""Part -> the split that is used for it where none is named."""


def load(name: str, subset: str | None = None, revision: str | None = None) -> Mapping[str, Any]:
    """Return split -> data set, to be read in a stream; code that comes with a data set is never run.

    name: a data set of the hub, or a local directory: one written by `save_to_disk`, or one of data files.

    Raises:
        DataError: the hub is out of reach, or there is no such data set, configuration or revision.
    """
    import datasets

    try:
        if any(Path(name, file).is_file() for file in ("dataset_dict.json", "state.json")):
            found = datasets.load_from_disk(name)
        else:
            found = datasets.load_dataset(name, subset, revision=revision, streaming=True)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise _unusable(name, subset, revision, error) from error
    return found if isinstance(found, Mapping) else {"train": found}


def rows(name: str, split: str, found: Mapping[str, Any]) -> Iterator[Row]:
    """Yield the rows of one split of what `load` found; class labels are given by their names.

    Raises:
        DataError: there is no such split, or it cannot be read to its end.
    """
    import datasets

    if split not in found:
        raise DataError(
            f"data set {name!r} has no split {split!r}; it has {', '.join(sorted(found))}: name one of them"
        )
    data = found[split]
    classes = {
        column: feature for column, feature in (data.features or {}).items() if isinstance(feature, datasets.ClassLabel)
    }
    try:
        for number, values in enumerate(data, start=1):
            named = {column: _class_name(feature, values.get(column)) for column, feature in classes.items()}
            yield Row(f"{name}, split {split}, row {number}", {**values, **named})
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise _unusable(name, None, None, error) from error


def _class_name(feature: Any, value: Any) -> Any:
    """Return the name of class `value`; None where there is none, as for -1, the mark of a hidden label."""
    return feature.int2str(value) if isinstance(value, int) and 0 <= value < feature.num_classes else None


def _unusable(name: str, subset: str | None, revision: str | None, error: Exception) -> DataError:
    asked = f"data set {name!r}"
    asked += f", subset {subset!r}" if subset else ""
    asked += f", revision {revision!r}" if revision else ""
    said = " ".join(str(error).split())
    return DataError(
        f"cannot read {asked} ({type(error).__name__}: {said[:200]}); check the name, and that the hub can be reached, "
        f"or give the path of a local copy"
    )
