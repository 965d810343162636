"""Rows of a Hugging Face data set: by its name, or from a directory that `save_to_disk` or a download left."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from memmcl.errors import ConfigError, DataError, shown
from memmcl.files import allowed
from memmcl.files.untrusted import parse_yaml
from memmcl.suite.rows import Row
from memmcl.urls import public, redact

SPLITS = {"train": "train", "weak": "validation", "test": "test"}
"""Our split -> the split of the data set that is used for it where none is named."""
_FAILURES = (OSError, ValueError, RuntimeError)


def load(name: str, subset: str | None = None, revision: str | None = None) -> Mapping[str, Any]:
    """Return split -> data set, to be read in a stream; code that comes with a data set is never run.

    name: a data set of the hub, or a local directory: one written by `save_to_disk`, or one of data files.

    Raises:
        ConfigError: a place that may not be opened, or a card that names files which are not the data set's own.
        DataError: the hub is out of reach, or there is no such data set, configuration or revision.
    """
    import datasets
    import httpx
    from huggingface_hub import HfApi

    local = Path(name).exists()
    if local:
        allowed.require_files(Path(name))
    else:
        allowed.require_hub(name, "datasets")
    try:
        if any(Path(name, file).is_file() for file in ("dataset_dict.json", "state.json")):
            loaded = datasets.load_from_disk(name)
        else:
            if not local:  # the commit that the revision is now, so that card and files are of one
                revision = HfApi().dataset_info(name, revision=revision).sha
            _check_cards(name, revision)
            loaded = datasets.load_dataset(name, subset, revision=revision, streaming=True)
    except (datasets.exceptions.DatasetsError, httpx.HTTPError, yaml.YAMLError, *_FAILURES) as error:
        raise _unusable(name, subset, revision, error) from error
    return loaded if isinstance(loaded, Mapping) else {"train": loaded}


def rows(name: str, split: str, splits: Mapping[str, Any]) -> Iterator[Row]:
    """Yield the rows of a split that `load` returned, class labels by name. Raises DataError if it cannot be read."""
    import datasets

    if split not in splits:
        raise DataError(
            f"data set {shown(name)} has no split {shown(split)}; it has {', '.join(sorted(splits))}: name one of them"
        )
    data = splits[split]
    if data.features and isinstance(data, datasets.IterableDataset):
        data = data.decode(False)  # an image would be fetched from wherever its row says
    classes = {
        column: feature for column, feature in (data.features or {}).items() if isinstance(feature, datasets.ClassLabel)
    }
    try:
        for number, values in enumerate(data, start=1):
            named = {column: _class_name(feature, values.get(column)) for column, feature in classes.items()}
            yield Row(f"{name}, split {split}, row {number}", {**values, **named})
    except (datasets.exceptions.DatasetsError, *_FAILURES) as error:
        raise _unusable(name, None, None, error) from error


def _check_cards(name: str, revision: str | None) -> None:
    """Raise ConfigError for a data set whose card names files elsewhere: `datasets` opens any path and any URL."""
    from huggingface_hub import DatasetCard

    card: Any = DatasetCard(_text_of(name, "README.md", revision), ignore_metadata_errors=True).data
    beside = parse_yaml(_text_of(name, ".huggingface.yaml", revision))
    for settings in (vars(card), beside):
        for place in _strings(settings.get("configs") if isinstance(settings, dict) else None):
            if "://" in place or "::" in place or place.startswith(("/", "~")) or ".." in place.split("/"):
                raise ConfigError(
                    f"data set {public(name)!r}: its card names {public(place)!r}, which is no file of its own; take "
                    "another data set, or give its files by path"
                )


def _text_of(name: str, file: str, revision: str | None) -> str:
    """Return the text of one file of a data set, "" where it has none."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    path = Path(name, file)
    if not Path(name).exists():
        try:
            path = Path(hf_hub_download(name, file, repo_type="dataset", revision=revision))
        except EntryNotFoundError:
            return ""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _strings(value: Any) -> Iterator[str]:
    """Yield the texts of a tree of plain values, names included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for inner in itertools.chain(*value.items()) if isinstance(value, Mapping) else value:
            yield from _strings(inner)


def _class_name(feature: Any, value: Any) -> Any:
    """Return the name of class `value`; None where there is none, as for -1, the mark of a hidden label."""
    return feature.int2str(value) if isinstance(value, int) and 0 <= value < feature.num_classes else None


def _unusable(name: str, subset: str | None, revision: str | None, error: Exception) -> DataError:
    what = f"data set {public(name)!r}"
    what += f", subset {shown(subset)}" if subset else ""
    what += f", revision {shown(revision)}" if revision else ""
    reason = " ".join(redact(str(error)).split())
    return DataError(
        f"cannot read {what} ({type(error).__name__}: {reason[:200]}); check the name, and that the hub can be "
        "reached, or give the path of a local copy"
    )
