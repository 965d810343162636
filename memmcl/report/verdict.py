"""The comparisons in words: a difference counts only beyond two standard errors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from memmcl.report.results import Results
from memmcl.report.schema import Comparison

CLEAR = 2.0  # standard errors beyond which a paired difference is called a difference

Outcome = Literal["ahead", "level", "behind"]


@dataclass(frozen=True)
class Statement:
    """One comparison in words: `text` is a whole sentence, `outcome` says which way it went."""

    text: str
    outcome: Outcome
    comparison: Comparison


@dataclass(frozen=True)
class Verdict:
    """`headline` is the answer to "does the unified model beat its base"; the rest follows in order."""

    headline: str
    outcome: Outcome | None
    statements: tuple[Statement, ...]
    subtasks: str


@dataclass(frozen=True)
class Advice:
    """Which model to ship: "unified", "joint" (the LoRA that was trained on all subtasks at once), or "base"."""

    model: Literal["unified", "joint", "base"]
    text: str


def outcome(difference: float, se: float) -> Outcome:
    """Return which way `difference` goes; "level" within two standard errors."""
    if abs(difference) <= CLEAR * se or difference == 0:
        return "level"
    return "ahead" if difference > 0 else "behind"


def plus_minus(value: float | None, se: float | None = None) -> str:
    """Return "0.612 ± 0.031"; without a standard error the value alone; an en dash for None."""
    if value is None:
        return "–"
    number = f"{value:.3f}".replace("-", "−")
    return number if se is None else f"{number} ± {se:.3f}"


def signed(value: float, se: float | None = None) -> str:
    """Return `plus_minus` with its sign always shown."""
    rounded = round(value, 3) or 0.0  # no "-0.000"
    return ("+" if rounded >= 0 else "") + plus_minus(rounded, se)


def leaders(results: Results, subtask: str | None) -> frozenset[str]:
    """Return the models to print in bold in one column: the best and all within one standard error of it.

    `subtask=None` means the column of means. Experts are left out: each is scored on its own subtask only,
    so they are a ceiling and no competitor. The standard error is the larger of the two compared.
    """
    rivals = [model.name for model in results.models if model.kind != "expert"]
    values = {name: value for name in rivals if (value := results.value_of(name, subtask))}
    best, best_se = max(values.values(), default=(0.0, 0.0))
    return frozenset(name for name, (value, se) in values.items() if best - value <= max(se, best_se))


def verdict(results: Results) -> Verdict:
    """Return the comparisons of `results` in words; that of the unified model with the base is the headline."""
    statements = statements_of(results)
    kinds = {model.name: model.kind for model in results.models}
    first = next((s for s in statements if s.comparison.b == "base" and kinds[s.comparison.a] == "unified"), None)
    if first is None:
        return Verdict("The unified model was not compared with its base", None, statements, "")
    rest = tuple(statement for statement in statements if statement is not first)
    return Verdict(first.text.rstrip("."), first.outcome, rest, _tally(results, first.comparison.a))


def advice(results: Results) -> Advice:
    """Return which model to ship: the joint LoRA only where it beats the unified model, and none that is no better.

    Level with the joint LoRA, the unified model is preferred: one subtask can be retrained without the others.
    """
    against = {one.comparison.b: one for one in statements_of(results) if one.comparison.a == "unified"}
    base, joint = against.get("base"), against.get("joint")
    if joint is not None and joint.outcome == "behind":
        return Advice("joint", f"Ship the joint LoRA: t{joint.text[1:]}")
    why = [one.text.rstrip(".").removeprefix("The unified model ") for one in (base, joint) if one is not None]
    if base is not None and base.outcome == "ahead":
        return Advice("unified", f"Ship the unified model: it {', and '.join(why)}.")
    said = ", and ".join(why) or "was not compared with its base"
    return Advice("base", f"Ship none yet: the unified model {said}. More rows or steps may help.")


def statements_of(results: Results) -> tuple[Statement, ...]:
    """Return the comparisons of `results` in words, in their order."""
    statements = []
    for pair in results.comparisons:
        a, b = (_noun(results, name) for name in (pair.a, pair.b))
        by = plus_minus(abs(pair.difference), pair.se)
        result = outcome(pair.difference, pair.se)
        ends: dict[Outcome, str] = {
            "ahead": f"beats {b} by {by}",
            "behind": f"falls behind {b} by {by}",
            "level": f"is level with {b} ({signed(pair.difference, pair.se)})",
        }
        statements.append(Statement(f"{a[0].upper()}{a[1:]} {ends[result]}.", result, pair))
    return tuple(statements)


def _noun(results: Results, name: str) -> str:
    model = results.model_of(name)
    if model is None or name == "base":
        return f"the {name} model"
    word = model.title.partition(" ")[0]  # "Joint" becomes "joint", "LoRA" stays
    title = model.title[:1].lower() + model.title[1:] if word[1:].islower() else model.title
    return f"the {title.removeprefix('the ')}" if model.kind == "unified" else title


def _tally(results: Results, name: str) -> str:
    pairs = [
        (merged, base)
        for subtask in results.subtasks
        if (merged := results.value_of(name, subtask.name)) and (base := results.value_of("base", subtask.name))
    ]
    if not pairs:
        return ""
    outcomes = [outcome(merged - base, math.hypot(se, base_se)) for (merged, se), (base, base_se) in pairs]
    higher = sum(merged > base for (merged, _), (base, _) in pairs)
    noun = "subtask" if len(pairs) == 1 else "subtasks"
    return (
        f"Above the base on {higher} of {len(pairs)} {noun}; beyond two standard errors (unpaired): "
        f"{outcomes.count('ahead')} better, {outcomes.count('behind')} worse."
    )
