"""The curriculum: how hard subtasks are, in which order they are met, with which context. numpy only."""

from memmcl.config.run import CONTEXTS
from memmcl.curriculum.context import Context, Shots, build_context
from memmcl.curriculum.difficulty import DEFAULT_WEIGHTS, DifficultyReport, difficulties, order_subtasks
from memmcl.curriculum.gate import Option, choose

__all__ = [
    "CONTEXTS",
    "DEFAULT_WEIGHTS",
    "Context",
    "DifficultyReport",
    "Option",
    "Shots",
    "build_context",
    "choose",
    "difficulties",
    "order_subtasks",
]
