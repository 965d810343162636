"""References: what one model reaches on the rows of a subtask, as the unit that candidates are measured in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from safetensors.torch import save as save_tensors

from memmcl.backbone.forward import Backbone
from memmcl.config import EvaluationConfig, SearchConfig
from memmcl.errors import ModelError
from memmcl.evaluate.asking import evaluation_key, weak_answers
from memmcl.evaluate.scoring import Probe
from memmcl.evaluate.teacher_forced import TeacherForced
from memmcl.search.document import ReferenceValues
from memmcl.search.problem import DISTRIBUTIONS
from memmcl.suite import metrics
from memmcl.suite.examples import Example
from memmcl.suite.prompts import Prompter
from memmcl.suite.subtasks import Subtask


def reference_key(search: SearchConfig, evaluation: EvaluationConfig, model: Mapping[str, object]) -> dict[str, Any]:
    """Return the settings that decide a reference; `model` is `ModelSpec.key()`."""
    return {"evaluation": evaluation_key(evaluation), "fitness": sorted(search.weights), "model": model}


def gold_answers(model: tuple[Backbone, Prompter], subtask: Subtask, rows: Sequence[Example]) -> TeacherForced:
    """Return the rows' teacher-forced gold answers, batched as for candidates, since other batches round otherwise."""
    return TeacherForced(*model, subtask, rows, [row.answer for row in rows])


def values_of(
    search: SearchConfig,
    evaluation: EvaluationConfig,
    probe: Probe,
    golds: TeacherForced,
    rows: Sequence[Example],
    model: str,
) -> ReferenceValues:
    """Return what the current weights, those of `model`, reach on rows; label scores are computed once for all of it.

    Of generated answers the metric is left out unless the fitness needs it, because decoding is what costs.

    Raises:
        ModelError: a likelihood that is not finite: nothing can be measured in it.
    """
    kinds = search.weights
    (forced,) = golds.segments()
    bad = int((~np.isfinite(forced.logprobs)).sum())
    if bad:
        raise ModelError(
            f"{model}: the likelihoods of {bad} of {len(rows)} rows of {probe.subtask.name} are not finite; look "
            "whether its weights are, or take a model.dtype of a larger range (bfloat16, float32)"
        )
    wanted = not probe.subtask.is_tuple or "metric" in kinds or "agree" in kinds
    answers = weak_answers(evaluation, probe) if wanted else []
    loglik = float(forced.logprobs.sum() / forced.tokens.sum())
    shares = forced.choices.logshares(evaluation.calibration) if forced.choices else None
    return ReferenceValues(
        loglik=loglik,
        choice=loglik if shares is None else float(shares.mean()),
        score=metrics.score_subtask(probe.subtask, rows, answers) if wanted else None,
        logprobs=forced.logprobs.tolist(),
        choices={name: value.tolist() for name, value in vars(forced.choices).items()} if forced.choices else None,
        answers=answers if "agree" in kinds else None,
    )


def expectations(
    model: tuple[Backbone, Prompter], subtask: Subtask, answered: Mapping[str, tuple[Sequence[Example], Sequence[str]]]
) -> dict[str, bytes]:
    """Return the file of the current weights' next-token distributions at the answers of weak and selection rows."""
    tensors = {}
    for which, (rows, answers) in answered.items():
        expected = TeacherForced(*model, subtask, rows, answers).distributions()
        tensors[f"{which}.ids"] = expected.ids.int().contiguous()
        tensors[f"{which}.logprobs"] = expected.logprobs.contiguous()
    return {DISTRIBUTIONS: save_tensors(tensors)}
