"""Contexts of one subtask, by the settings of `curriculum`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from memmcl.config import CurriculumConfig
from memmcl.curriculum.context import Context, build_context
from memmcl.seeds import derive
from memmcl.suite.examples import Example
from memmcl.suite.prompts import Prompter
from memmcl.suite.subtasks import Subtask


def context_of(
    kind: str,
    cfg: CurriculumConfig,
    subtasks: Mapping[str, Subtask],
    subtask: Subtask,
    prompter: Prompter,
    rows: Mapping[str, Sequence[Example]],
    order: Sequence[str],
    seed: int,
) -> Context:
    """Return the context `kind` of a subtask; demonstrations are drawn from `rows`, by name of the subtask.

    order: all subtasks, the easiest first. seed: of the run.
    """
    return build_context(
        kind,
        subtask.name,
        order=order,
        demonstrations=rows,
        own_shots=cfg.own_shots,
        others_per_subtask=cfg.shots_per_subtask,
        budget_tokens=cfg.budget_tokens,
        count_tokens=lambda name, row: prompter.demonstration_tokens(subtasks[name], row, subtask),
        seed=derive(seed, "context", subtask.name),
    )
