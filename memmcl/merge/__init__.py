"""Merging: task vectors of experts on one base, combined by the coefficients of a genome."""

from memmcl.config.methods import METHODS
from memmcl.merge.table import merge_task_vectors

__all__ = ["METHODS", "merge_task_vectors"]
