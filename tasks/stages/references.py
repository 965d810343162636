"""What rows are held to: how an expert, and the base, fare on a subtask's weak and selection rows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.states import State
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from memmcl.backbone.forward import Backbone
from memmcl.errors import ModelError
from memmcl.evaluate.choice import Choices
from memmcl.evaluate.given import Distributions, GivenAnswers
from memmcl.evaluate.scoring import Probe
from memmcl.store import ArtifactRef, Store
from memmcl.suite import metrics
from memmcl.suite.examples import Example
from memmcl.suite.prompts import Prompter
from memmcl.suite.subtasks import Subtask
from tasks.run.models import adapted_model, make_probe, weak_answers
from tasks.run.runtime import Run, read_rows, resident, reuse_or_make, worth_retrying

REFERENCE_VERSION = 7
DOCUMENT, DISTRIBUTIONS = "reference.json", "expert.safetensors"
WEAK, SELECTION = "weak", "selection"
Values = dict[str, Any]
"""loglik: mean gold log-probability per answer token; choice: mean log of the gold label's share among the labels, of
tuples loglik; score: the metric, None where it was not asked for; logprobs: by row, the summed log-probability of the
gold answer; choices: by row, what makes its label's share, None of tuples; answers: where the fitness is agreement."""


@task(
    name="reference",
    task_run_name="reference {subtask}",
    cache_policy=NO_CACHE,
    retries=1,
    retry_condition_fn=worth_retrying,
)
def measure_reference(
    run: Run, subtask: str, expert: ArtifactRef, weak: ArtifactRef, train: ArtifactRef, selection: ArtifactRef | None
) -> State[ArtifactRef]:
    """Measure the expert, the base and the best constant answer on the subtask's weak rows, and on its selection rows.

    The expert is the unit of every retention; an answer that is always the same tells what its score is worth.
    """

    def make() -> tuple[dict[str, bytes], dict[str, Any]]:
        asked, rows = run.subtask(subtask), read_rows(run, weak)
        bench = {WEAK: rows} | ({SELECTION: read_rows(run, selection)} if selection else {})
        measured, files = measure_rows(run, asked, bench, expert)
        constant, score = metrics.best_constant(asked, read_rows(run, train), rows)
        document = {**measured, "constant": {"answer": constant, "score": score}}
        brief = {name: brief_of(document[name]) for name in ("base", "expert")}
        return {DOCUMENT: json.dumps(document).encode(), **files}, {**brief, "constant": document["constant"]}

    return reuse_or_make(
        run, "reference", name=f"reference {subtask}",
        inputs=[expert, weak, train, *([selection] if selection else [])], config=reference_config(run),
        stage_version=REFERENCE_VERSION, make=make,
    )  # fmt: skip


def reference_config(run: Run) -> dict[str, Any]:
    """Return what of the configuration decides a reference."""
    evaluation = run.config.evaluation.model_dump(mode="json", include={"batch_size", "max_new_tokens", "calibration"})
    return {"evaluation": evaluation, "fitness": sorted(run.config.search.weights), "model": run.model_key()}


def measure_rows(
    run: Run, subtask: Subtask, parts: Mapping[str, Sequence[Example]], expert: ArtifactRef
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Return base and expert on weak rows, and on selection rows where there are any; with files, if any.

    The document has "base" and "expert" for weak rows, and the same under "selection".
    """
    backbone, prompter = resident(run)
    probes = {part: make_probe(run, backbone, prompter, subtask, rows) for part, rows in parts.items()}
    golds = {part: gold_answers(backbone, prompter, subtask, rows) for part, rows in parts.items()}
    with adapted_model(run, expert):
        who = f"expert {subtask.name}"
        experts = {part: values_of(run, probes[part], golds[part], rows, who) for part, rows in parts.items()}
        files = {}
        if "agree" in run.config.search.weights:
            answers = {part: (rows, experts[part]["answers"]) for part, rows in parts.items()}
            files = expectations(backbone, prompter, subtask, answers)
    document: dict[str, Any] = {}
    for part, rows in parts.items():
        base = values_of(run, probes[part], golds[part], rows, "the base")
        both = {"base": base, "expert": experts[part]}
        document |= both if part == WEAK else {part: both}
    return document, files


def expectations(
    backbone: Backbone,
    prompter: Prompter,
    subtask: Subtask,
    parts: Mapping[str, tuple[Sequence[Example], Sequence[str]]],
) -> dict[str, bytes]:
    """Return the file of what the weights of now expect at the answers given to the rows of each part."""
    tensors = {}
    for part, (rows, answers) in parts.items():
        expected = GivenAnswers(backbone, prompter, subtask, rows, answers).distributions()
        tensors[f"{part}.ids"] = expected.ids.int().contiguous()
        tensors[f"{part}.logprobs"] = expected.logprobs.contiguous()
    return {DISTRIBUTIONS: save_tensors(tensors)}


def gold_answers(backbone: Backbone, prompter: Prompter, subtask: Subtask, rows: Sequence[Example]) -> GivenAnswers:
    """Return rows with their gold answers, run as those of candidates are: other batches round otherwise."""
    return GivenAnswers(backbone, prompter, subtask, rows, [row.answer for row in rows])


def values_of(run: Run, probe: Probe, golds: GivenAnswers, rows: Sequence[Example], model: str) -> Values:
    """Return what the weights of now, those of `model`, reach on rows; label scores are run once for all of it.

    Of generated answers the metric is left out unless the fitness needs it, because decoding is what costs.

    Raises:
        ModelError: a likelihood that is not finite: nothing could be held to it.
    """
    kinds = run.config.search.weights
    (found,) = golds.parts()
    bad = int((~np.isfinite(found.logprobs)).sum())
    if bad:
        raise ModelError(
            f"{model}: the likelihoods of {bad} of {len(rows)} rows of {probe.subtask.name} are not finite; look "
            "whether its weights are, or take a model.dtype of a larger range (bfloat16, float32)"
        )
    wanted = not probe.subtask.is_tuple or "metric" in kinds or "agree" in kinds
    answers = weak_answers(run, probe) if wanted else []
    loglik = float(found.logprobs.sum() / found.tokens.sum())
    shares = found.choices.logshares(run.config.evaluation.calibration) if found.choices else None
    return {
        "loglik": loglik,
        "choice": loglik if shares is None else float(shares.mean()),
        "score": metrics.score_subtask(probe.subtask, rows, answers) if wanted else None,
        "logprobs": found.logprobs.tolist(),
        "choices": {name: value.tolist() for name, value in vars(found.choices).items()} if found.choices else None,
        **({"answers": answers} if "agree" in kinds else {}),
    }


def read_reference(store: Store, ref: ArtifactRef, rows: str) -> tuple[dict[str, Any], Distributions | None]:
    """Return what the expert reaches on weak or selection rows, and what it expects there, if that is kept."""
    document = json.loads(store.read(ref, DOCUMENT))
    found = (document if rows == WEAK else document[rows])["expert"]
    if DISTRIBUTIONS not in store.load(ref).blobs:
        return found, None
    tensors = load_tensors(store.read(ref, DISTRIBUTIONS))
    return found, Distributions(tensors[f"{rows}.ids"].long(), tensors[f"{rows}.logprobs"].float())


def choices_of(values: Mapping[str, Any]) -> Choices | None:
    """Return the choices of the rows that were measured; None of tuples."""
    found = values["choices"]
    return Choices(**{name: np.array(value) for name, value in found.items()}) if found else None


def brief_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values without those of single rows."""
    return {name: values[name] for name in ("loglik", "choice", "score")}
