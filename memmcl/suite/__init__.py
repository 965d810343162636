"""The suite: which subtasks there are, where their rows come from, and how answers are scored.

    subtasks   the table of subtasks: group, labels or tuple fields, instruction, metric, data sets
    examples   one row (`Example`), its answer text, its content key, and rows as Parquet
    sources    reads rows wherever they lie, with rows, files, hub, sentieval and faults
    embedded   reads the corpus that ships with memmcl
    fetch      downloads SentiEval's published files
    splits     train / weak / selection / test, disjoint by content over all subtasks
    prompts    the chat messages that ask a model
    parsing    from a model's text to a label or to tuples
    metrics    SentiEval's metrics, and the counts per row that a bootstrap sums

Nothing in here loads torch.
"""

from memmcl.suite.examples import Example
from memmcl.suite.metrics import score
from memmcl.suite.subtasks import SUBTASKS, Subtask

__all__ = ["SUBTASKS", "Example", "Subtask", "score"]
