"""Probes, answers and offsets by the settings of `evaluation`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from memmcl.backbone.forward import Backbone
from memmcl.config import EvaluationConfig
from memmcl.evaluate import calibration
from memmcl.evaluate.scoring import Probe
from memmcl.suite.examples import Example
from memmcl.suite.prompts import Demonstration, Prompter
from memmcl.suite.subtasks import Subtask


def evaluation_key(cfg: EvaluationConfig) -> dict[str, Any]:
    """Return the settings that decide answers, for cache keys."""
    return cfg.model_dump(mode="json", include={"batch_size", "max_new_tokens", "calibration"})


def make_probe(
    cfg: EvaluationConfig,
    model: tuple[Backbone, Prompter],
    subtask: Subtask,
    rows: Sequence[Example],
    demonstrations: Sequence[Demonstration] = (),
) -> Probe:
    """Return the rows as a probe, with the batch size and the answer length of the settings."""
    return Probe(
        *model,
        subtask,
        rows,
        demonstrations=demonstrations,
        batch_size=cfg.batch_size,
        max_new_tokens=cfg.max_new_tokens,
    )


def weak_answers(cfg: EvaluationConfig, probe: Probe) -> list[str]:
    """Return the current weights' answers to weak rows; label scores, computed once, are calibrated on these rows."""
    if probe.subtask.is_tuple:
        return probe.answers()
    scores = probe.label_scores()
    return probe.best_labels(scores, calibration.fit(scores) if cfg.calibration else None)


def offsets_of(cfg: EvaluationConfig, weak: Probe) -> np.ndarray | None:
    """Return (labels,) float64 to take from label scores, found on weak rows; None for tuples, or uncalibrated."""
    if weak.subtask.is_tuple or not cfg.calibration:
        return None
    return calibration.fit(weak.label_scores())
