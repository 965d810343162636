"""`memmcl data`: what the subtasks are, whether rows can be used, and what they are like."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.cli.app import App
from flows.cli.common import Overrides
from flows.cli.fetch import fetch
from flows.terminal import console, output, table
from memmcl.config import load_config
from memmcl.errors import DataError, brief
from memmcl.suite.faults import Fault, Faults
from memmcl.suite.subtasks import GROUPS, SUBTASKS, Subtask

if TYPE_CHECKING:
    from memmcl.suite.sources import Reading
    from memmcl.suite.stats import Lengths, SplitStats

data_app = App(
    help="The data of a run: which subtasks there are, whether their rows can be used, what the rows are like."
)
data_app.command("fetch", talks=True)(fetch)

DataPath = Annotated[
    str | None,
    typer.Argument(
        metavar="[PATH]", help="Directory or URL in SentiEval's layout; without it, the data of the configuration"
    ),
]
RunFile = Annotated[
    Path | None, typer.Option("--config", help="YAML file of a run: its subtasks, and where their rows lie")
]


@data_app.command("list")
def data_list(config: RunFile = None, set_: Overrides = None) -> None:
    """List the subtasks: those of the catalogue, and those that a configuration adds.

    For example:

    $ memmcl data list
    $ memmcl data list --config my.yaml
    """
    from memmcl.suite.configured import catalogue

    chosen = catalogue(load_config(config, set_ or []))
    known = {**SUBTASKS, **chosen}
    listed = table("name", "group", "answer", "metric", "data sets", "in the run")
    for name, subtask in known.items():
        answer = f"({', '.join(subtask.tuple_fields)}), ..." if subtask.is_tuple else ", ".join(subtask.labels)
        datasets = ", ".join(subtask.datasets) if name in SUBTASKS else "your own"
        listed.add_row(name, subtask.group, answer, subtask.metric, datasets, "yes" if name in chosen else "")
    if config is None and not set_:
        del listed.columns[-1]
    console.print(listed)
    output.answer([{**asdict(subtask), "in_run": name in chosen} for name, subtask in known.items()])


@data_app.command("check")
def data_check(path: DataPath = None, config: RunFile = None, set_: Overrides = None) -> None:
    """Read every row and list those that cannot be used; exit code 1 if there are any.

    Warnings are about rows that are used, and about folders that nothing reads. With PATH and --config, the subtasks
    are those of the configuration, and PATH takes the place of data.source.

    For example:

    $ memmcl data check my-data
    $ memmcl data check --config my.yaml
    """
    from memmcl.suite.sources import read_sources
    from memmcl.suite.stats import leakage

    subtasks, reading = _what_to_read(path, config, set_ or [])
    faults = _Listed()
    warnings = _unread(path, reading.storage) if path else []
    missing: list[str] = []
    left_out: Counter[str] = Counter()
    rows = 0
    for subtask in subtasks:  # one by one: what one lacks does not hide what is wrong with the next
        try:
            read = read_sources([subtask], reading, faults=faults)
        except DataError as error:
            if str(error) not in missing:
                missing.append(str(error))
                console.print(missing[-1], soft_wrap=True)
            continue
        rows += sum(map(len, read.pools[subtask.name].values()))
        left_out += read.dropped
        warnings += [
            f"{leak.dataset}: {leak.equal} {leak.part} rows have a text of its own test part; a run stops there, or "
            f"drops them with data.on_overlap: drop"
            for leak in leakage(read.pools)
            if leak.equal and leak.dataset == leak.test_dataset
        ]
    warnings += map(str, faults.odd)
    for warning in warnings:
        console.print(f"warning: {warning}", soft_wrap=True)
    for file, kinds in sorted(faults.by_file.items()):
        counts = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())
        console.print(f"{file}: {counts}", soft_wrap=True)
    _show_left_out(left_out)
    console.print(
        f"{len(subtasks)} subtasks, {rows:,} rows that can be used, {len(faults) + len(missing):,} faults, "
        f"{len(warnings):,} warnings"
    )
    document = {"subtasks": len(subtasks), "rows": rows, "faults": faults.listed, "missing": missing}
    output.answer(document | {"warnings": warnings, "left_out": left_out})
    raise typer.Exit(1 if len(faults) or missing else 0)


@data_app.command("stats")
def data_stats(path: DataPath = None, config: RunFile = None, set_: Overrides = None) -> None:
    """Show how many rows each part has, how its labels are balanced, how long texts are, and what leaks.

    Rows that cannot be used are left out and counted; `memmcl data check` lists them.

    For example:

    $ memmcl data stats
    $ memmcl data stats my-data --json
    """
    from memmcl.suite.sources import read_sources
    from memmcl.suite.stats import constants, describe, leakage

    subtasks, reading = _what_to_read(path, config, set_ or [])
    read = read_sources(subtasks, reading)
    splits, leaks = describe(subtasks, read.pools), leakage(read.pools)
    best = constants(subtasks, read.pools)
    unusable = {f"rows that cannot be used: {kind}": count for kind, count in sorted(read.faults.counts.items())}
    left_out = {**unusable, **read.dropped}
    output.answer({"parts": splits, "leakage": leaks, "constants": best, "left_out": left_out})
    _show_splits(splits)
    console.print("\nTexts that leak: rows of a part that equal a test text, or share 36 characters with one")
    rows = [(leak.dataset, leak.part, leak.test_dataset, str(leak.equal), str(leak.sharing)) for leak in leaks]
    console.print(table("data set", "part", "test texts of", "equal", "share", rows=rows) if leaks else "none")
    console.print("\nThe one answer that scores best on the training rows, and its score on the test rows")
    answers = [(constant.subtask, constant.answer, f"{constant.score:.3f}") for constant in best]
    console.print(table("subtask", "answer", "score", rows=answers))
    _show_left_out(left_out)


class _Listed(Faults):
    """Prints each fault as soon as it is found, and counts by file; keeps all warnings for later.

    listed: the faults, with --json.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_file: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.odd: list[Fault] = []
        self.listed: list[Fault] = []

    def add(self, fault: Fault) -> None:
        super().add(fault)
        self.by_file[fault.place.rpartition(", ")[0]][fault.kind] += 1
        console.print(str(fault), soft_wrap=True)
        if output.json:
            self.listed.append(fault)

    def warn(self, fault: Fault) -> None:
        super().warn(fault)
        self.odd.append(fault)


def _what_to_read(path: str | None, config: Path | None, overrides: Sequence[str]) -> tuple[list[Subtask], Reading]:
    """Return the subtasks, and where their rows are read from."""
    from memmcl.suite.configured import catalogue, reading_of

    settings = load_config(config, overrides)
    reading = reading_of(settings)
    if path is not None:
        reading = replace(reading, source=path)
        if config is None:
            return _subtasks_in(path, reading.storage), reading
    return list(catalogue(settings).values()), reading


def _subtasks_in(path: str, storage: Mapping[str, Any] | None) -> list[Subtask]:
    """Return the subtasks of the catalogue that have a data set in a directory of SentiEval's layout."""
    folders = _datasets_in(path, storage)
    present = [subtask for subtask in SUBTASKS.values() if folders & _folders_of(subtask)]
    if not present:
        from memmcl.urls import public

        raise DataError(
            f"no data sets at {brief(public(path))}: expected a directory in SentiEval's layout, with folders as sc/mr "
            f"or absa/aste_rest14; `memmcl data list` names all"
        )
    return present


def _unread(path: str, storage: Mapping[str, Any] | None) -> list[str]:
    """Return a warning for each folder that belongs to no subtask of the catalogue."""
    unknown = _datasets_in(path, storage).difference(*map(_folders_of, SUBTASKS.values()))
    return [
        f"{folder}: no data set of the catalogue is called so; nothing reads this folder" for folder in sorted(unknown)
    ]


def _folders_of(subtask: Subtask) -> set[str]:
    return {f"{subtask.group.lower()}/{name}" for name in subtask.datasets}


def _datasets_in(path: str, storage: Mapping[str, Any] | None) -> set[str]:
    """Return the folders GROUP/DATASET below `path`, or below `data` there."""
    from memmcl.files.places import open_place, reading

    with reading(path):
        fs, root = open_place(path, storage)
        for base in (root.rstrip("/"), f"{root.rstrip('/')}/data"):
            groups = [f"{base}/{group.lower()}" for group in GROUPS if fs.isdir(f"{base}/{group.lower()}")]
            entries = [entry for group in groups for entry in fs.ls(group, detail=True)]
            if groups:
                folders = (entry["name"].rstrip("/") for entry in entries if entry["type"] == "directory")
                return {"/".join(folder.split("/")[-2:]) for folder in folders}
    return set()


def _show_left_out(left_out: Mapping[str, int]) -> None:
    for reason, count in left_out.items():
        console.print(f"left out: {count:,} {reason}", soft_wrap=True)


def _show_splits(splits: Sequence[SplitStats]) -> None:
    sizes = table("subtask", "data set", "part", "rows", "texts", "repeats", "answers", "missing")
    for one in splits:
        answers = ", ".join(f"{count} {label}" for label, count in one.labels.items())
        if one.tuples is not None:
            answers = f"{one.tuples:.2f} tuples a row"
        counts = [f"{count:,}" for count in (one.rows, one.texts, one.repeats)]
        sizes.add_row(one.subtask, one.dataset, one.part, *counts, answers, ", ".join(one.missing))
    console.print(sizes)
    console.print("\nLengths of texts: 5th percentile, median, 95th percentile, maximum")
    lengths = [(one.dataset, one.part, _lengths(one.characters), _lengths(one.words)) for one in splits]
    console.print(table("data set", "part", "characters", "words", rows=lengths))


def _lengths(lengths: Lengths) -> str:
    return " / ".join(f"{value:,.0f}" for value in astuple(lengths))
