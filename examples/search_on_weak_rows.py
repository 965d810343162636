"""Search the weights of two LoRA adapters on a few labelled rows, in this process: no Ray, no Prefect.

    python examples/search_on_weak_rows.py BASE sent2=FOLDER irony=FOLDER WEAK.jsonl OUT

An adapter is named after the subtask that it was trained for. WEAK.jsonl has one row a line, as
{"subtask": "sent2", "text": "Fine soup.", "label": "positive"}.
"""

import sys

import memmcl


def main(base: str, first: str, second: str, weak: str, out: str) -> None:
    """Print the best candidates, and write the best merge to OUT."""
    experts = dict(argument.split("=", 1) for argument in (first, second))

    result = memmcl.search_merge(
        base,
        experts,
        weak=weak,
        evaluations=20,
        settings={"search": {"strategy": "bayesian", "bounds": [0.0, 1.5]}, "seed": 1},
        store=f"{out}/store",  # every candidate is recorded here; a search that was interrupted goes on from it
    )
    print(result)
    best_first = result.candidates.sort_by([("fitness", "descending")])
    for candidate in best_first.slice(0, 5).to_pylist():
        print(f"{candidate['origin']:12} fitness {candidate['fitness']:.3f}  {dict(candidate['genome'])}")
    result.save(f"{out}/merged")


if __name__ == "__main__":
    main(*sys.argv[1:])
