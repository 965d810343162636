"""The section `curriculum`."""

from typing import Annotated

from pydantic import Field, field_validator

from memmcl.config.section import OneOf, Section

CONTEXTS = ("zero-shot", "own-shots", "curriculum", "reversed", "random")
"""Demonstrations that a prompt may begin with; see `memmcl.curriculum.context`."""


class CurriculumConfig(Section):
    """Difficulty, contexts, and the gate that picks one per subtask on weak rows."""

    contexts: tuple[Annotated[str, OneOf(CONTEXTS)], ...] = Field(CONTEXTS, description="Contexts that are compared")
    own_shots: int = Field(4, ge=0, description="Demonstrations of the subtask itself, at most")
    shots_per_subtask: int = Field(1, ge=0, description="Demonstrations of each easier subtask, at most")
    budget_tokens: int = Field(512, ge=0, description="Tokens that demonstrations may take")
    gate_margin: float = Field(
        1.0, ge=0, description="Paired standard errors by which a context must beat zero-shot on weak rows"
    )
    weights: dict[str, float] | None = Field(
        None, description="Weights of the difficulty's meta features by name; empty: the documented defaults"
    )

    @field_validator("contexts")
    @classmethod
    def _has_zero_shot(cls, contexts: tuple[str, ...]) -> tuple[str, ...]:
        if "zero-shot" not in contexts or len(set(contexts)) != len(contexts):
            raise ValueError("contexts must name zero-shot, and each context once")
        return contexts
