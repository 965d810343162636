"""Finished runs as objects: results, predictions, candidates, models."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from memmcl.api.notebook import html_table
from memmcl.backbone.resident import Base
from memmcl.config import RunConfig, parse_config
from memmcl.errors import CorruptArtifact, DataError, shown
from memmcl.report.curve import curve_svg
from memmcl.report.results import Results, parse_results
from memmcl.store import ArtifactRef, Manifest, Store, newest, read_champions
from memmcl.urls import redacted

LATEST, CHAMPION = "latest", "champion"


@dataclass(frozen=True, repr=False)
class FinishedRun:
    """A finished run in a store. manifest: of its last artifact, whose inputs are the run's other artifacts."""

    store: Store
    manifest: Manifest

    @property
    def id(self) -> str:
        """The run's id, 64 hex digits."""
        return self.manifest.key

    @property
    def name(self) -> str:
        """What its configuration calls it."""
        return self.manifest.name

    @cached_property
    def results(self) -> Results:
        """Scores, trainings, searches, contexts and timings; what the report is drawn from."""
        return parse_results(json.loads(self.store.read(self.manifest, "results.json")))

    @cached_property
    def config(self) -> RunConfig:
        """The settings that it was run with."""
        return parse_config(redacted(self.results.run.config), f"run {self.id[:8]}")

    @cached_property
    def base(self) -> Base:
        """The base model that it was run on."""
        return Base.model_validate_json(self.store.read(self.manifest, "base.json"))

    @property
    def order(self) -> tuple[str, ...]:
        """The subtasks in the order of the curriculum, the easiest first."""
        return tuple(entry.name for entry in self.results.subtasks)

    @cached_property
    def artifacts(self) -> dict[str, ArtifactRef]:
        """The artifacts of the run, by `kind:name`, as `expert:expert irony`."""
        return {f"{ref.kind}:{ref.name}": ref for ref in self.manifest.inputs}

    @property
    def report(self) -> str:
        """The report, one HTML page."""
        return self.store.read(self.manifest, "report.html").decode()

    @cached_property
    def scores(self) -> pa.Table:
        """One row per model and subtask: score, standard error, metric, rows."""
        return pa.Table.from_pylist([score.model_dump() for score in self.results.scores])

    @cached_property
    def predictions(self) -> pa.Table:
        """The answers of every model to all test rows: subtask, id, text, gold, and a column per model."""
        tables = []
        for name in self.order:
            answers = self._table(f"evaluation:evaluation {name}", "predictions.parquet")
            tables.append(answers.add_column(0, "subtask", pa.array([name] * answers.num_rows)))
        return pa.concat_tables(tables, promote_options="default")

    @cached_property
    def candidates(self) -> pa.Table:
        """All candidates of all searches: genome, origin, fitness, values by subtask, rows, seconds."""
        names = sorted(name for name, ref in self.artifacts.items() if ref.kind == "search")
        return pa.concat_tables([self._table(name, "candidates.parquet") for name in names], promote_options="default")

    def save(self, folder: str | Path) -> list[Path]:
        """Write the report and the unified model's adapter into a folder; return what was written.

        Raises:
            CorruptArtifact: a file of the run is damaged.
        """
        folder, written = Path(folder), []
        unified = self.artifacts["unified:unified model"]
        files = {f"adapter/{name}": self.store.read(unified, name) for name in self.store.load(unified).blobs}
        for name, data in {"report.html": self.report.encode(), **files}.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            written.append(path)
        return written

    def _table(self, artifact: str, file: str) -> pa.Table:
        return pq.read_table(io.BytesIO(self.store.read(self.artifacts[artifact], file)))

    def _means(self) -> list[tuple[str, str]]:
        return [(mean.model, f"{mean.mean:.3f} ± {mean.se:.3f}") for mean in self.results.means]

    def __repr__(self) -> str:
        means = ", ".join(f"{model} {value}" for model, value in self._means() if model in ("base", "unified", "joint"))
        return f"FinishedRun({self.id[:8]} {self.name!r}: {means})"

    def _repr_html_(self) -> str:
        table = html_table(("model", "mean score"), self._means(), caption=f"run {self.id[:8]}, {self.name}")
        whole = [one for one in self.candidates.to_pylist() if one["search"] == "unified" and not one["stopped"]]
        return table + curve_svg([one["fitness"] for one in whole])


def open_run(
    store: str | Store = "memmcl-store",
    run: str = LATEST,
    *,
    champion: str = CHAMPION,
    settings: Mapping[str, Any] | None = None,
) -> FinishedRun:
    """Open a finished run.

    Args:
        store: directory or URL of the store, or the store itself.
        run: the first digits of its id; "latest"; "champion".
        champion: the name of the champion.
        settings: of the store, as {"endpoint_url": ..., "region": ...}.

    Raises:
        DataError: no such run.
        CorruptArtifact: it is damaged.
    """
    opened = store if isinstance(store, Store) else Store.open(store, **(settings or {}))
    start = "" if run == LATEST else run
    if run == CHAMPION:
        current = read_champions(opened, champion).current
        if current is None:
            raise DataError(f"no champion {shown(champion)} in {opened.url} yet; the first retrain makes one")
        start = current.run_id
    manifest = newest(opened, "run", start)
    if manifest is None:
        which = f"whose id starts with {shown(start)} " if start else ""
        raise DataError(f"no finished run {which}in {opened.url}; start one with `memmcl run CONFIG`")
    problems = opened.closure("run", manifest.key, leaves=("anchors", "warm")).problems
    if problems:
        raise CorruptArtifact(
            f"run {manifest.key[:8]} is damaged: {problems[0].what}; run its command again, or mend it by "
            f"`memmcl store verify --repair {manifest.key[:8]} --store {opened.url}`"
        )
    return FinishedRun(opened, manifest)
