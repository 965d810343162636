"""Open a finished run: its scores, its wrong answers, a plot of its searches, and its model on texts of yours.

    python examples/look_at_a_run.py STORE PLOT.png "A text." "Another text."

STORE is a folder or URL that `memmcl run` wrote its results to.
"""

import sys

import matplotlib

matplotlib.use("Agg")  # no window: the plot goes to a file
import matplotlib.pyplot as plt

import memmcl


def main(store: str, plot: str, *texts: str) -> None:
    """Print scores and predictions, and write the plot."""
    run = memmcl.open_run(store, "latest")
    print(run)
    for mean in run.results.means:
        print(f"{mean.model:16} {mean.mean:.3f} ± {mean.se:.3f}")
    wrong = [row for row in run.predictions.to_pylist() if row["unified"] != row["gold"]]
    print(f"{len(wrong)} of {run.predictions.num_rows} test rows are answered wrongly by the unified model")
    plot_searches(run, plot)

    model = memmcl.load_model(store, "latest")
    for prediction in model.predict(list(texts)):
        answer = prediction.tuples if prediction.label is None else prediction.label
        print(f"{prediction.input} | {prediction.subtask}: {answer}")


def plot_searches(run: memmcl.FinishedRun, path: str) -> None:
    """Draw the fitness of every candidate that was fully evaluated, one colour a search."""
    candidates = run.candidates.to_pandas()
    candidates = candidates[~candidates["stopped"]]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, search in candidates.groupby("search"):
        axes.plot(search["index"], search["fitness"], marker="o", linestyle="none", label=name)
    axes.set(xlabel="candidate", ylabel="fitness on the weak rows")
    axes.legend()
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    main(*sys.argv[1:])
