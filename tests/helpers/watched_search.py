"""A program that runs two searches with races, one of them with a joint search behind it, and notes each evaluation.

    python tests/helpers/watched_search.py CASE NOTES

CASE is what `write_case` wrote. Workers append a line to NOTES as they begin a candidate: the mark of the tree that
they belong to, their process id, the search's key, genome. What was found is printed: the winners' coefficients.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from search_fixture import problem_of, publish_experts

from memmcl.evolve import seed_genomes
from memmcl.search.plan import SearchPlan, make_spec
from memmcl.search.problem import SearchProblem
from memmcl.search.spec import SearchSpec
from memmcl.store import ArtifactRef
from tasks.run.ray_session import ray_session
from tasks.run.runtime import Run, open_store
from tasks.search.driver import RayDriver
from tasks.search.queue import Candidate
from tasks.search.worker import Worker

MEMBERS = ("sent2", "irony", "emotion")
SEARCHES = {"pair": (MEMBERS[1:], 18, 14), "trio": (MEMBERS, 28, 0)}
"""By name: what is searched over, candidates, candidates of the joint search."""
ROWS = 8
SECONDS = 0.6
"""That a candidate takes longer than it would on a tiny base."""


class Watched(Worker):
    """A worker that notes what it begins, and takes its time."""

    notes = ""

    def _evaluate(self, spec: SearchSpec, candidate: Candidate) -> dict[str, Any]:
        note = [os.environ.get("MEMMCL_TEST_TREE", ""), os.getpid(), spec.key, candidate["genome"]]
        with Path(self.notes).open("ab", buffering=0) as notes:
            notes.write(json.dumps(note).encode() + b"\n")  # one write of a file opened to append: whole lines
        time.sleep(SECONDS)
        return super()._evaluate(spec, candidate)


def write_case(run: Run, base: Path, path: Path) -> None:
    """Publish three random experts, rows and references; write `path`."""
    published = publish_experts(run, base, dict.fromkeys(MEMBERS, ROWS))
    refs = {group: {name: ref.model_dump() for name, ref in by_name.items()} for group, by_name in published.items()}
    path.write_text(json.dumps({"run": run.model_dump(mode="json"), "published": refs}))


def plans_of(case: dict[str, Any]) -> tuple[Run, SearchProblem, list[SearchPlan]]:
    """Return the run, what is searched on, and the searches."""
    run = Run.model_validate(case["run"])
    refs = {
        group: {name: ArtifactRef(**ref) for name, ref in by_name.items()}
        for group, by_name in case["published"].items()
    }
    problem = problem_of(run, refs)
    cfg, plans = run.config.search, []
    for title, (members, evaluations, joint) in SEARCHES.items():
        inputs = problem.inputs(list(members))
        seeds = seed_genomes(list(members), cfg.blocks, cfg.bounds, cfg.lambdas)
        each = {name: {name: (1.0,) * cfg.blocks} for name in members}
        spec = make_spec(problem, title, each, members, seeds, evaluations, inputs)
        plans.append(SearchPlan(problem, spec, inputs, joint=joint))
    return run, problem, plans


def main(case: Path, notes: Path) -> None:
    """Run the searches to their end and print the winners."""
    run, problem, plans = plans_of(json.loads(case.read_text()))
    courses = [plan.course() for plan in plans]
    worker = type("Watched", (Watched,), {"notes": str(notes)})
    with ray_session(run.config.ray):
        RayDriver(run.config.ray, worker).run(problem, courses, lambda *_: None)
    winners = {}
    for plan, course in zip(plans, courses, strict=True):
        done = plan.publish(course.phases, 0.0)
        document = json.loads(open_store(run).read(done, "search.json"))
        winners[plan.name] = [done.metrics["winner"], document["fitness"], document["coefficients"]]
    print(json.dumps(winners))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
