"""Ask the unified model of a finished run about one text: every subtask, each in the context of its gate."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from memmcl.curriculum.context import Context
from memmcl.evaluate.scoring import Probe
from memmcl.store import Manifest, Store
from memmcl.suite.examples import Example
from memmcl.suite.parsing import parse_tuples
from memmcl.suite.subtasks import Subtask
from tasks.run.models import adapted_model
from tasks.run.runtime import Run, reopen
from tasks.stages.contexts import context_probe, contexts_of

ASPECTS = "uabsa"
"""The subtask whose answer tells which aspects a text speaks of."""


@dataclass(frozen=True)
class Answer:
    """One line of the answer: subtask, what it was asked about, what the model said, how sure it is."""

    title: str
    about: str
    answer: str
    confidence: str


def answer_all(
    store: Store, done: Manifest, text: str, *, aspects: Sequence[str] = (), targets: Sequence[str] = ()
) -> list[Answer]:
    """Answer every subtask of the run `done` about `text`.

    Aspect polarity is asked about `aspects`, or else about those that the model found itself; a subtask that needs
    something else takes the first of `targets`, as many as it needs, or says what is missing.
    """
    run, refs, order = reopen(store, done)
    if not torch.cuda.is_available():  # what was trained on a GPU answers on a CPU too
        base = run.base.model_copy(update={"device": "cpu"})
        run = run.model_copy(update={"base": base})
    train = {name: refs[f"split:{name} train"] for name in order}
    answers: dict[str, list[Answer]] = {}
    found = list(aspects)
    with adapted_model(run, refs["unified:unified model"]) as (backbone, prompter):

        def ask(name: str, fields: dict[str, str]) -> Answer:
            subtask = run.subtask(name)
            gate = json.loads(store.read(refs[f"gate:context gate {name}"], "gate.json"))
            chosen = next(entry for entry in gate if entry["chosen"])
            context = _context(run, subtask, prompter, train, order, chosen["context"])
            row = Example.create("question", text, subtask.labels[0] if subtask.labels else (), fields)
            return _said(
                context_probe(run, backbone, prompter, subtask, [row], context), subtask, chosen["offsets"], fields
            )

        # The subtask that finds aspects goes first: the others may be asked about them.
        for name in sorted(order, key=lambda name: (name != ASPECTS, order.index(name))):
            needs = run.subtask(name).needs
            if name == ASPECTS:
                answers[name] = [ask(name, {})]
                found = found or [first for first, *_ in parse_tuples(answers[name][0].answer, 2).tuples]
            elif needs == ("aspect",):
                asked = [ask(name, {"aspect": aspect}) for aspect in dict.fromkeys(found)]
                answers[name] = asked or [_missing(run.subtask(name), "no aspect found; name one with --aspect")]
            elif len(targets) < len(needs):
                answers[name] = [
                    _missing(run.subtask(name), f"needs {', '.join(needs)}; give --target {len(needs)} times")
                ]
            else:
                answers[name] = [ask(name, dict(zip(needs, targets, strict=False)))]
    return [answer for name in order for answer in answers[name]]


def _context(run: Run, subtask: Subtask, prompter: Any, train: Any, order: Sequence[str], kind: str) -> Context:
    return next(context for context in contexts_of(run, subtask, prompter, train, order) if context.kind == kind)


def _said(probe: Probe, subtask: Subtask, offsets: list[float] | None, fields: dict[str, str]) -> Answer:
    about = ", ".join(fields.values()) or "the text"
    if subtask.is_tuple:
        (text,) = probe.answers()
        parsed = parse_tuples(text, len(subtask.tuple_fields), subtask.tuple_fields)
        return Answer(subtask.title, about, text if not parsed.rejected else f"unreadable: {text}", "")
    scores = probe.label_scores()[0] - (np.array(offsets) if offsets else 0.0)
    share = np.exp(scores - np.logaddexp.reduce(scores))
    best = int(share.argmax())
    return Answer(subtask.title, about, subtask.labels[best], f"{share[best]:.2f}")


def _missing(subtask: Subtask, why: str) -> Answer:
    return Answer(subtask.title, "", f"({why})", "")
