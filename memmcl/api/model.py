"""A model in use: a run's unified model, asked each subtask with the demonstrations that its gate chose."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from memmcl.adapters.format import CONFIG_FILE, WEIGHTS_FILE, Adapter
from memmcl.adapters.load import load_published, read_adapter, read_folder
from memmcl.api.model_file import ModelFile, read_model_file
from memmcl.api.notebook import html_table
from memmcl.api.runs import ADAPTER, LATEST, MODEL_FILE, FinishedRun, find_run, repairable
from memmcl.backbone.forward import Backbone
from memmcl.backbone.resident import ModelSpec, resident
from memmcl.config import RunConfig, parse_config
from memmcl.errors import DataError, UsageError, shown
from memmcl.evaluate.asking import make_probe
from memmcl.evaluate.pseudo import label_rows
from memmcl.merge.build import added
from memmcl.store import Store
from memmcl.suite.configured import catalogue
from memmcl.suite.examples import Example
from memmcl.suite.parsing import parse_tuples
from memmcl.suite.prompts import Prompter
from memmcl.suite.subtasks import Subtask

SHOWN = 10
"""Predictions that a repr shows."""
ASPECTS = "uabsa"
"""The subtask whose answer tells which aspects a text speaks of."""


@dataclass(frozen=True)
class Prediction:
    """An answer of the model. about: what it was asked about, by field, as {"aspect": "food"}.

    label: of a subtask with labels, and probability: its share among the labels, in (0, 1]. tuples: of a subtask whose
    answers are tuples; None where the text cannot be read as such. text: what was generated. missing: the fields
    without which the question cannot be asked; then there is no answer.
    """

    subtask: str
    input: str
    about: Mapping[str, str]
    label: str | None = None
    probability: float | None = None
    tuples: tuple[tuple[str, ...], ...] | None = None
    text: str | None = None
    missing: tuple[str, ...] = ()

    @property
    def answer(self) -> str:
        """The answer in words: the label, the tuples, or what is missing."""
        if self.missing:
            return f"needs {', '.join(self.missing)}"
        return self.label or "; ".join(", ".join(item) for item in self.tuples or ()) or self.text or ""


class Predictions(list[Prediction]):
    """Answers, in the order of the texts, then of the subtasks."""

    def table(self) -> pa.Table:
        """Return them as a table, one a row."""
        rows = [asdict(one) | {"about": json.dumps(dict(one.about)), "missing": list(one.missing)} for one in self]
        return pa.Table.from_pylist([{**row, "tuples": json.dumps(row["tuples"])} for row in rows])

    def _rows(self) -> list[tuple[str, ...]]:
        shares = ["" if one.probability is None else f"{one.probability:.2f}" for one in self]
        words = [(one.input[:80], one.subtask, ", ".join(one.about.values()), one.answer) for one in self]
        return [(*row, share) for row, share in zip(words, shares, strict=True)]

    def __repr__(self) -> str:
        lines = [", ".join(filter(None, row)) for row in self._rows()[:SHOWN]]
        more = [f"... and {len(self) - SHOWN} more"] if len(self) > SHOWN else []
        return "\n  ".join([f"Predictions({len(self)})", *lines, *more])

    def _repr_html_(self) -> str:
        return html_table(("text", "subtask", "about", "answer", "probability"), self._rows())


@dataclass(frozen=True, repr=False)
class SentimentModel:
    """The unified model of a finished run. Its base stays loaded in this process.

    file: what it was saved with: the run's id, its base, how each subtask is asked. config: the run's settings.
    adapter: LoRA factors by module. subtasks: by name, in the order of the curriculum.
    """

    file: ModelFile
    config: RunConfig
    adapter: Adapter
    spec: ModelSpec
    subtasks: Mapping[str, Subtask]

    def predict(
        self,
        texts: str | Sequence[str],
        *,
        subtasks: Sequence[str] | None = None,
        aspects: Sequence[str] = (),
        targets: Sequence[str] = (),
    ) -> Predictions:
        """Answer subtasks about one text or several.

        Args:
            texts: the texts.
            subtasks: names of the run's; None: all.
            aspects: what aspect polarity is asked about; without it, the aspects that the model itself finds.
            targets: for a subtask that needs something else, as stance; as many as it needs are taken.

        Raises:
            UsageError: an unknown subtask, or an empty text.
        """
        asked = [texts] if isinstance(texts, str) else list(texts)
        if not asked or not all(text.strip() for text in asked):
            raise UsageError("expected texts to analyse, got an empty one")
        names = list(self.subtasks) if subtasks is None else list(subtasks)
        unknown = [name for name in names if name not in self.subtasks]
        if unknown:
            raise UsageError(f"unknown subtask {unknown[0]}; those of the run are {', '.join(self.subtasks)}")
        answered: dict[tuple[int, str], list[Prediction]] = {}
        model = resident(self.spec)
        with added(model[0], {"unified": self.adapter}):
            spoken_of = [list(aspects) for _ in asked]
            for name in sorted(names, key=lambda name: (name != ASPECTS, names.index(name))):
                questions = [(at, about) for at, of in enumerate(spoken_of) for about in self._about(name, of, targets)]
                for (at, _), answer in zip(questions, self._ask(model, name, asked, questions), strict=True):
                    answered.setdefault((at, name), []).append(answer)
                    if name == ASPECTS and not aspects:
                        spoken_of[at] += [first for first, *_ in answer.tuples or ()]
        return Predictions(one for at in range(len(asked)) for name in names for one in answered.get((at, name), []))

    def _about(self, name: str, aspects: Sequence[str], targets: Sequence[str]) -> list[dict[str, str] | None]:
        """Return the fields of each question; None for one that cannot be asked."""
        needs = self.subtasks[name].needs
        if not needs:
            return [{}]
        if needs == ("aspect",):
            return [{"aspect": aspect} for aspect in dict.fromkeys(aspects)] or [None]
        return [dict(zip(needs, targets, strict=False)) if len(targets) >= len(needs) else None]

    def _ask(
        self,
        model: tuple[Backbone, Prompter],
        name: str,
        texts: Sequence[str],
        questions: Sequence[tuple[int, dict[str, str] | None]],
    ) -> list[Prediction]:
        subtask = self.subtasks[name]
        rows = [
            Example.create("question", texts[at], subtask.labels[0] if subtask.labels else (), about)
            for at, about in questions
            if about is not None
        ]
        answers = iter(self._answers(model, subtask, rows) if rows else [])
        return [
            Prediction(name, texts[at], {}, missing=subtask.needs)
            if about is None
            else Prediction(name, texts[at], about, **next(answers))
            for at, about in questions
        ]

    def _answers(
        self, model: tuple[Backbone, Prompter], subtask: Subtask, rows: Sequence[Example]
    ) -> list[dict[str, Any]]:
        prompt, fields = self.file.prompts[subtask.name], subtask.tuple_fields
        shots = [(self.subtasks[shot.subtask], shot.example) for shot in prompt.demonstrations]
        probe = make_probe(self.config.evaluation, model, subtask, rows, shots)
        if subtask.is_tuple:
            parsed = [(text, parse_tuples(text, len(fields), fields)) for text in probe.answers()]
            return [{"text": text, "tuples": None if one.rejected else tuple(one.tuples)} for text, one in parsed]
        return [{"label": label, "probability": share} for label, share in label_rows(probe, prompt.offsets)]

    def __repr__(self) -> str:
        return f"SentimentModel(run {self.file.run[:8]} on {self.spec.base.name}: {', '.join(self.subtasks)})"

    def _repr_html_(self) -> str:
        rows = [
            (one.name, one.title, ", ".join(one.labels) or f"({', '.join(one.tuple_fields)})")
            for one in self.subtasks.values()
        ]
        return html_table(("subtask", "title", "answers"), rows, caption=repr(self))


def load_model(store: str | Path | Store = "memmcl-store", run: str = LATEST) -> SentimentModel:
    """Load the unified model of a finished run. What was trained on a GPU answers on a CPU too.

    Args:
        store: directory or URL of the store, or the store itself; or a folder that `FinishedRun.save`, or
            `memmcl report --out`, wrote.
        run: the first digits of its id; "latest"; "champion".

    Raises:
        MemmclError: no such run, or its base model is not here.
    """
    if not isinstance(store, Store) and (Path(store) / MODEL_FILE).is_file():
        file, files = read_model_file(Path(store) / MODEL_FILE), read_folder(Path(store) / ADAPTER)
        return _model(file, read_adapter(files[WEIGHTS_FILE], files[CONFIG_FILE]))
    opened = store if isinstance(store, Store) else Store.open(str(store))
    return model_of(FinishedRun(opened, find_run(opened, run)))


def model_of(run: FinishedRun) -> SentimentModel:
    """Load the unified model of a run, and read nothing else of it.

    Raises:
        MemmclError: what is read is damaged, or its base model is not here.
    """
    with repairable(run.store, run.id):
        return _model(run.model_file, load_published(run.store, run.artifacts["unified:unified model"]))


def _model(file: ModelFile, adapter: Adapter) -> SentimentModel:
    config = parse_config(file.config, f"run {file.run[:8]}")
    base = file.base if torch.cuda.is_available() else file.base.model_copy(update={"device": "cpu"})
    spec = ModelSpec(
        base=base,
        revision=config.model.revision,
        max_prompt_tokens=config.data.max_prompt_tokens,
        threads=torch.get_num_threads(),
    )
    subtasks = catalogue(config)
    named = {*file.prompts, *(shot.subtask for prompt in file.prompts.values() for shot in prompt.demonstrations)}
    if not named <= subtasks.keys():
        raise DataError(
            f"the model of run {file.run[:8]} is asked for subtasks that its settings have not: "
            f"{shown(sorted(named - subtasks.keys())[0])}; export the run again"
        )
    return SentimentModel(file, config, adapter, spec, {name: subtasks[name] for name in file.prompts})
