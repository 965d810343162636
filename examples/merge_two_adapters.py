"""Merge two LoRA adapters, then search how they are merged best: in this process, without Ray and Prefect.

    python examples/merge_two_adapters.py BASE NAME=FOLDER NAME=FOLDER WEAK.jsonl OUT

BASE is a hub id or a folder; WEAK.jsonl has rows as {"subtask": "sent2", "text": "...", "label": "positive"}.
"""

import sys

import memmcl


def main(base: str, first: str, second: str, weak: str, out: str) -> None:
    """Write two models: OUT/equal, where both count the same, and OUT/searched."""
    experts = dict(place.split("=", 1) for place in (first, second))
    memmcl.merge_experts(base, experts, method="ties", rank=16).save(f"{out}/equal")

    found = memmcl.search_merge(base, experts, weak, evaluations=20)
    print(found)  # the best weights, and the fitness that they reach
    print(found.candidates.select(["origin", "fitness"]).to_pylist()[:5])
    if any(any(weights) for weights in found.best.values()):  # else the base alone is best on these rows
        found.save(f"{out}/searched")


if __name__ == "__main__":
    main(*sys.argv[1:])
