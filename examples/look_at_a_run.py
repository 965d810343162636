"""Look at a finished run: its scores, its predictions, its candidates, and its model on texts of yours.

Usage: ``python examples/look_at_a_run.py STORE "A text." "Another text."``
"""

import sys

import memmcl


def main(store: str, *texts: str) -> None:
    """Print what a run found, and what its model says of the texts."""
    run = memmcl.open_run(store, "latest")
    print(run)
    wrong = [row for row in run.predictions.to_pylist() if row["unified"] != row["gold"]]
    print(f"{len(wrong)} of {run.predictions.num_rows} test rows are answered otherwise than their labels say")
    best = max(run.candidates.to_pylist(), key=lambda row: row["fitness"] or 0.0)
    print(f"best candidate: {best['search']} {best['index']}, fitness {best['fitness']:.3f}")

    model = memmcl.load_model(store)
    for prediction in model.predict(list(texts)):
        answer = prediction.label if prediction.label is not None else prediction.tuples
        print(f"{prediction.input} | {prediction.subtask}: {answer}")


if __name__ == "__main__":
    main(*sys.argv[1:])
