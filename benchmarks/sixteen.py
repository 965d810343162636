"""All sixteen experts on their own subtasks' test rows, against the base and the best constant answer.

    python benchmarks/sixteen.py --data DIR --out sixteen.jsonl [--variant warm:own_steps=320] [--steps 160]

At most 100 test rows a data set. A difference counts when it is more than two standard errors of the paired bootstrap
over rows above the base, and above the one answer that scores best on the training rows. Prints a row a subtask.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experts import Trial, parse
from lab import Lab

from memmcl.evaluate.bootstrap import paired_mean_difference
from memmcl.suite.subtasks import SUBTASKS


def measure(trial: Trial, text: str, only: Sequence[str], chosen: bool) -> list[dict[str, Any]]:
    """Train the experts and return a line for each."""
    lab = trial.lab
    base = {name: lab.answers(name, chosen=chosen) for name in only}
    print("base measured", flush=True)
    warm, experts = trial.experts(parse(text), only)
    lines = []
    with lab.merger(experts, warm) as (merger, pinned):
        for name in experts:
            merger.apply({name: (1.0,)} | pinned)
            counts, score = lab.counts(name, lab.answers(name, chosen=chosen))
            rows = len(counts)
            line: dict[str, Any] = {"subtask": name, "n": rows, "expert": float(score(counts.sum(axis=0)))}
            for rival, answers in {"base": base[name], "constant": [lab.constant(name)] * rows}.items():
                theirs, _ = lab.counts(name, answers)
                paired = paired_mean_difference([(counts, theirs, score)], samples=2000, seed=0)
                line |= {
                    rival: float(score(theirs.sum(axis=0))),
                    f"over {rival}": paired.difference,
                    f"se {rival}": paired.standard_error,
                }
            line["beats both"] = all(line[f"over {r}"] > 2 * line[f"se {r}"] for r in ("base", "constant"))
            lines.append(line)
            print(row_of(line), flush=True)
    return lines


def row_of(line: dict[str, Any]) -> str:
    """Return one row of the table."""
    rivals = ("base", "constant")
    against = [f"{line[r]:.3f} | {line[f'over {r}']:+.3f} ± {line[f'se {r}']:.3f}" for r in rivals]
    cells = [line["subtask"], line["n"], f"{line['expert']:.3f}", *against, "yes" if line["beats both"] else "no"]
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="directory in SentiEval's layout")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--keep", type=Path, default=Path("experts-kept"))
    parser.add_argument("--variant", default="warm")
    parser.add_argument("--subtasks", nargs="+", default=list(SUBTASKS))
    parser.add_argument(
        "--experts", nargs="+", help="those of --subtasks that are trained and measured; by default all"
    )
    parser.add_argument("--chosen", action="store_true", help="label scores as they are where weak rows say so")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--train-rows", type=int, default=600)
    parser.add_argument("--weak-rows", type=int, default=48)
    parser.add_argument("--top", type=int, default=10, help="layers that are adapted, from the top; 0: all")
    parser.add_argument("--scored", choices=("test", "weak"), default="test", help="weak: to choose settings by")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    lab = Lab(
        asked.data,
        asked.subtasks,
        asked.keep,
        train_rows=asked.train_rows,
        weak_rows=asked.weak_rows,
        test_rows=1000,
        per_dataset=100,
        scored=asked.scored,
        top=asked.top,
        max_tokens=320,
    )
    print("| subtask | n | expert | base | over base | constant | over constant | beats both |")
    trial, only = Trial(lab, asked.seed, asked.steps, asked.batch), asked.experts or asked.subtasks
    lines = measure(trial, asked.variant, only, asked.chosen)
    asked.out.write_text("\n".join(json.dumps(vars(asked) | line, default=str) for line in lines) + "\n")
    print(f"{sum(line['beats both'] for line in lines)} of {len(lines)} beat both")


if __name__ == "__main__":
    main()
