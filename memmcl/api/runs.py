"""Finished runs as objects: results, predictions, candidates, models."""

from __future__ import annotations

import io
import json
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memmcl.api.notebook import html_table
from memmcl.config import RunConfig, parse_config
from memmcl.errors import ArtifactNotFound, CorruptArtifact, ModelError, UsageError, shown
from memmcl.report.curve import curve_svg
from memmcl.report.results import Results, parse_results
from memmcl.store import ArtifactRef, Champions, Manifest, Reign, Store, newest, read_champions
from memmcl.store.objects import write_file
from memmcl.urls import redacted

if TYPE_CHECKING:  # reading a report loads neither
    import pyarrow as pa

    from memmcl.api.model_file import ModelFile
    from memmcl.backbone.resident import Base

LATEST, CHAMPION = "latest", "champion"
MODEL_FILE = "sentiment_model.json"
ADAPTER, WHOLE = "adapter", "model"
"""Folders of a saved run: the unified model as a PEFT adapter, and with whole weights."""


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
        from memmcl.backbone.resident import Base

        return Base.model_validate_json(self.store.read(self.manifest, "base.json"))

    @property
    def order(self) -> tuple[str, ...]:
        """The subtasks in the order of the curriculum, the easiest first."""
        return tuple(entry.name for entry in self.results.subtasks)

    @cached_property
    def artifacts(self) -> dict[str, ArtifactRef]:
        """The artifacts of the run, by `kind:name`, as `expert:expert irony`."""
        return self.manifest.inputs_by_name

    @property
    def report(self) -> str:
        """The report, one HTML page."""
        return self.store.read(self.manifest, "report.html").decode()

    @cached_property
    def scores(self) -> pa.Table:
        """One row per model and subtask: score, standard error, metric, rows."""
        import pyarrow as pa

        return pa.Table.from_pylist([score.model_dump() for score in self.results.scores])

    @cached_property
    def predictions(self) -> pa.Table:
        """The answers of every model to all test rows: subtask, id, text, gold, and a column per model."""
        import pyarrow as pa

        tables = []
        for name in self.order:
            answers = self._table(f"evaluation:evaluation {name}", "predictions.parquet")
            tables.append(answers.add_column(0, "subtask", pa.array([name] * answers.num_rows)))
        return pa.concat_tables(tables, promote_options="default")

    @cached_property
    def candidates(self) -> pa.Table:
        """All candidates of all searches: genome, origin, fitness, values by subtask, rows, seconds."""
        import pyarrow as pa

        names = sorted(name for name, ref in self.artifacts.items() if ref.kind == "search")
        return pa.concat_tables([self._table(name, "candidates.parquet") for name in names], promote_options="default")

    @cached_property
    def model_file(self) -> ModelFile:
        """How the unified model is asked each subtask; a run of an earlier version is asked in the same way.

        Raises:
            ModelError: an earlier version's run whose base, and with it the tokenizer, is not here.
        """
        from memmcl.api.model_file import ModelFile, model_file_of
        from memmcl.backbone.resident import ModelSpec, resident_prompter

        if MODEL_FILE in self.manifest.blobs:
            return ModelFile.model_validate_json(self.store.read(self.manifest, MODEL_FILE))
        cfg = self.config
        spec = ModelSpec(base=self.base, revision=cfg.model.revision, max_prompt_tokens=cfg.data.max_prompt_tokens)
        return model_file_of(self.results, self.base, cfg, self.store, self.artifacts, resident_prompter(spec))

    def save(self, folder: str | Path) -> list[Path]:
        """Write the report, its tables, and the unified model into a folder; return the files.

        The model is in `adapter`, and in `model` where the run exported whole weights. `memmcl.load_model` takes the
        folder, but not that of an earlier version's run whose base is not here.

        Raises:
            CorruptArtifact: a file of the run is damaged.
        """
        folder = Path(folder)
        self.store.fetch(self.manifest, folder)
        for kind, name in (("unified", ADAPTER), ("model", WHOLE)):
            for ref in self.manifest.inputs:
                if ref.kind == kind:
                    self.store.fetch(ref, folder / name)
                    write_file(folder / name / "README.md", self.store.read(self.manifest, f"{name}.md"))
        if MODEL_FILE not in self.manifest.blobs:
            with suppress(ModelError):
                write_file(folder / MODEL_FILE, self.model_file.model_dump_json(indent=1).encode())
        return sorted(path for path in folder.rglob("*") if path.is_file())

    def _table(self, artifact: str, file: str) -> pa.Table:
        import pyarrow.parquet as pq

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
        UsageError: no such run.
        CorruptArtifact: it is damaged.
    """
    opened = store if isinstance(store, Store) else Store.open(store, **(settings or {}))
    manifest = find_run(opened, run, champion)
    problems = opened.run_closure(manifest.key).problems
    if problems:
        raise damaged(opened, manifest.key, f"{problems[0].where}: {problems[0].what}")
    return FinishedRun(opened, manifest)


def find_run(store: Store, run: str = LATEST, champion: str = CHAMPION) -> Manifest:
    """Return the manifest of a finished run; arguments and errors are those of `open_run`."""
    start = "" if run == LATEST else run
    if run == CHAMPION:
        start = current_reign(store, read_champions(store, champion)).run_id
    manifest = newest(store, "run", start)
    if manifest is not None:
        return manifest
    for path in store.objects.entries("manifests/run", start):
        raise damaged(store, Path(path).stem, f"its manifest {path} is not valid")
    which = f"whose id starts with {shown(start)} " if start else ""
    raise UsageError(
        f"no finished run {which}in {store.url}; start one with `memmcl run CONFIG`, or name another store"
    )


def current_reign(store: Store, champions: Champions) -> Reign:
    """Return the champion of now.

    Raises:
        UsageError: there is none.
    """
    if champions.current is None:
        raise UsageError(f"no champion {shown(champions.name)} in {store.url} yet; the first retrain makes one")
    return champions.current


def damaged(store: Store, run_id: str, what: str) -> CorruptArtifact:
    """Return the error for a damaged run; it says how to repair it."""
    return CorruptArtifact(
        f"run {run_id[:8]} is damaged: {what}; run its command again, or `memmcl store verify --repair {run_id[:8]} "
        f"--store {shlex.quote(store.url)}`: what is damaged is made again"
    )


@contextmanager
def repairable(store: Store, run_id: str) -> Iterator[None]:
    """Add to errors of missing or damaged artifacts to which run they belong, and how to repair it."""
    try:
        yield
    except (ArtifactNotFound, CorruptArtifact) as error:
        raise damaged(store, run_id, str(error).partition("; run the pipeline")[0]) from error
