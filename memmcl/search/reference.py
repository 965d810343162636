"""References: what one model reaches on the rows of a subtask, as the unit that candidates are measured in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from safetensors.torch import save as save_tensors

from memmcl.backbone.forward import Backbone
from memmcl.config import EvaluationConfig, SearchConfig
from memmcl.errors import ModelError
from memmcl.evaluate.asking import weak_answers
from memmcl.evaluate.given import GivenAnswers
from memmcl.evaluate.scoring import Probe
from memmcl.search.problem import DISTRIBUTIONS
from memmcl.suite import metrics
from memmcl.suite.examples import Example
from memmcl.suite.prompts import Prompter
from memmcl.suite.subtasks import Subtask

Values = dict[str, Any]
"""loglik: mean gold log-probability per answer token; choice: mean log of the gold label's share among the labels, of
tuples loglik; score: the metric, None where it was not asked for; logprobs: by row, the summed log-probability of the
gold answer; choices: by row, what makes its label's share, None of tuples; answers: where the fitness is agreement."""


def reference_key(search: SearchConfig, evaluation: EvaluationConfig, model: Mapping[str, object]) -> dict[str, Any]:
    """Return the settings that decide a reference; `model` is `ModelSpec.key()`."""
    asked = evaluation.model_dump(mode="json", include={"batch_size", "max_new_tokens", "calibration"})
    return {"evaluation": asked, "fitness": sorted(search.weights), "model": model}


def gold_answers(model: tuple[Backbone, Prompter], subtask: Subtask, rows: Sequence[Example]) -> GivenAnswers:
    """Return rows with their gold answers, run as those of candidates are: other batches round otherwise."""
    return GivenAnswers(*model, subtask, rows, [row.answer for row in rows])


def values_of(
    search: SearchConfig,
    evaluation: EvaluationConfig,
    probe: Probe,
    golds: GivenAnswers,
    rows: Sequence[Example],
    model: str,
) -> Values:
    """Return what the weights of now, those of `model`, reach on rows; label scores are run once for all of it.

    Of generated answers the metric is left out unless the fitness needs it, because decoding is what costs.

    Raises:
        ModelError: a likelihood that is not finite: nothing can be measured in it.
    """
    kinds = search.weights
    (found,) = golds.parts()
    bad = int((~np.isfinite(found.logprobs)).sum())
    if bad:
        raise ModelError(
            f"{model}: the likelihoods of {bad} of {len(rows)} rows of {probe.subtask.name} are not finite; look "
            "whether its weights are, or take a model.dtype of a larger range (bfloat16, float32)"
        )
    wanted = not probe.subtask.is_tuple or "metric" in kinds or "agree" in kinds
    answers = weak_answers(evaluation, probe) if wanted else []
    loglik = float(found.logprobs.sum() / found.tokens.sum())
    shares = found.choices.logshares(evaluation.calibration) if found.choices else None
    return {
        "loglik": loglik,
        "choice": loglik if shares is None else float(shares.mean()),
        "score": metrics.score_subtask(probe.subtask, rows, answers) if wanted else None,
        "logprobs": found.logprobs.tolist(),
        "choices": {name: value.tolist() for name, value in vars(found.choices).items()} if found.choices else None,
        **({"answers": answers} if "agree" in kinds else {}),
    }


def expectations(
    model: tuple[Backbone, Prompter], subtask: Subtask, parts: Mapping[str, tuple[Sequence[Example], Sequence[str]]]
) -> dict[str, bytes]:
    """Return the file of what the weights of now expect at the answers given to the rows of each part."""
    tensors = {}
    for part, (rows, answers) in parts.items():
        expected = GivenAnswers(*model, subtask, rows, answers).distributions()
        tensors[f"{part}.ids"] = expected.ids.int().contiguous()
        tensors[f"{part}.logprobs"] = expected.logprobs.contiguous()
    return {DISTRIBUTIONS: save_tensors(tensors)}


def brief_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values without those of single rows."""
    return {name: values[name] for name in ("loglik", "choice", "score")}
