"""The curriculum: how hard subtasks are, in which order they are met, with which context. numpy only."""

from memmcl.curriculum.context import CONTEXTS, Context, build_context
from memmcl.curriculum.difficulty import DEFAULT_WEIGHTS, DifficultyReport, difficulties
from memmcl.curriculum.gate import Option, choose
from memmcl.curriculum.order import MODES, order_subtasks

__all__ = [
    "CONTEXTS",
    "DEFAULT_WEIGHTS",
    "MODES",
    "Context",
    "DifficultyReport",
    "Option",
    "build_context",
    "choose",
    "difficulties",
    "order_subtasks",
]
