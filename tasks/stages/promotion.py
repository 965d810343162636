"""Champion and challenger: which rows changed, which run is better on the same test rows, and the promotion."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from prefect import State, task
from prefect.cache_policies import NO_CACHE
from prefect.events import emit_event
from pydantic import TypeAdapter

from memmcl.config import parse_config
from memmcl.errors import ServiceError
from memmcl.evaluate.promotion import Judgement, Pair, judge
from memmcl.store import (
    ArtifactRef,
    Champions,
    Manifest,
    Refs,
    Reign,
    StageSettings,
    Store,
    cache_key,
    promote,
    read_champions,
)
from memmcl.store.champion import now
from memmcl.suite import metrics
from memmcl.suite.splits import Splits
from memmcl.urls import redacted
from tasks.run.runtime import Run, open_store, read_rows, reopen, reuse_or_make, stage_task
from tasks.stages.contexts import ContextualModel, context_answers, read_gate
from tasks.stages.data import data_digests
from tasks.stages.evaluate import EVALUATION_VERSION, score_answers
from tasks.ui.history import root_flow_run_id
from tasks.ui.logs import log

JUDGEMENT_VERSION = 1
SPLITS = ("train", "weak", "test")


@dataclass(frozen=True)
class Champion:
    """The champion as a retrain needs it: the history of champions, the run and its artifacts by `kind:name`.

    done: its last artifact. order: of its curriculum.
    """

    champions: Champions
    done: Manifest
    run: Run
    refs: Mapping[str, ArtifactRef]
    order: tuple[str, ...]

    @property
    def id(self) -> str:
        """The first digits of its run's id."""
        return self.run.id[:8]

    @property
    def model(self) -> ContextualModel:
        """Its unified model, and the rows that its contexts are built from."""
        train = {name: self.refs[f"split:{name} train"] for name in self.order}
        return ContextualModel(unified=self.refs["unified:unified model"], train=train, order=self.order)

    def on_hardware_of(self, other: Run) -> Run:
        """Return the champion's run as it is scored beside another: on the same kind of device, in the same type."""
        base = self.run.base.model_copy(update={"device": other.base.device, "dtype": other.base.dtype})
        return self.run.model_copy(update={"base": base})


def find_champion(store: Store, name: str) -> Champion | None:
    """Return the champion, None when there never was one; ServiceError where its report is damaged or gone."""
    champions = read_champions(store, name)
    if champions.current is None:
        return None
    done = store.find("run", champions.current.run_id)
    if done is None:
        raise _not_whole(store, champions.current.run_id, "its report is damaged or gone")
    run, refs, order = reopen(store, done)
    return Champion(champions, done, run, refs, order)


def check_whole(store: Store, champion: Champion) -> None:
    """Raise a ServiceError if an artifact of the champion is damaged, before a challenger is trained."""
    problems = store.run_closure(champion.run.id).problems
    if problems:
        raise _not_whole(store, champion.run.id, f"{problems[0].where}: {problems[0].what}")


def _not_whole(store: Store, run_id: str, what: str) -> ServiceError:
    return ServiceError(
        f"the champion, run {run_id[:8]}, is not whole in {store.url} ({what}); `memmcl store verify --repair "
        f"{run_id[:8]}` makes it again; `memmcl champion rollback` takes the one before"
    )


def changed_rows(store: Store, champion: Champion, splits: Splits) -> list[dict[str, Any]]:
    """Return for every subtask and split whether its rows are those of the champion."""
    before = json.loads(store.read(champion.done, "results.json"))["data"]["digests"]
    after = data_digests(splits)
    return [
        {
            "subtask": name,
            **{split: _change(before.get(name, {}).get(split), after.get(name, {}).get(split)) for split in SPLITS},
        }
        for name in sorted(before | after)
    ]


def _change(before: str | None, after: str | None) -> str:
    if before is None or after is None:
        return "new" if before is None else "gone"
    return "same" if before == after else "changed"


def nothing_to_do(store: Store, run: Run, champion: Champion | None, splits: Splits) -> str | None:
    """Return why there is nothing to do for this run's data and settings; None when there is."""
    if champion is None:
        return None
    if run.id == champion.run.id:
        whole = not store.run_closure(run.id).problems
        return f"data and settings are those of the champion, run {champion.id}" if whole else None
    for run_id in sorted(champion.champions.rolled_back):
        if run_id == run.id or _made_from(store, run_id) == (data_digests(splits), run.config.what()):
            return f"these data and settings made run {run_id[:8]}, which was champion and was rolled back"
    earlier = read_judgement(store, run, champion)
    if earlier is not None and not earlier.promoted:
        return f"these data and settings made run {run.id[:8]}, which is {earlier.reason}"
    return None


def _made_from(store: Store, run_id: str) -> tuple[Any, Any] | None:
    """Return the digests of the rows, and the settings, of a run: its id depends on the anchor rows as well."""
    done = store.find("run", run_id)
    if done is None:
        return None
    results = json.loads(store.read(done, "results.json"))
    return results["data"]["digests"], parse_config(redacted(results["run"]["config"]), f"run {run_id[:8]}").what()


@stage_task("champion on test rows", run_name="champion on {subtask}", retries=1)
def score_champion(
    champion: Run, subtask: str, model: ContextualModel, gate: ArtifactRef, test: ArtifactRef
) -> State[ArtifactRef]:
    """Score the champion, in the context that its gate chose, on the challenger's test rows of one subtask."""

    def make() -> tuple[dict[str, bytes], dict[str, Any]]:
        asked, rows = champion.subtask(subtask), read_rows(champion, test)
        chosen = [entry for entry in read_gate(champion, gate) if entry["chosen"]]
        answers = context_answers(champion, asked, rows, model, chosen)["gated"]
        score = score_answers(champion, asked, rows, answers)
        log().info("champion on %s: %.3f", subtask, score["score"])
        return {"scores.json": json.dumps({"gated": score}).encode()}, {}

    return reuse_or_make(
        champion,
        "evaluation",
        name=f"champion on {subtask}",
        inputs=[model.unified, gate, test, *model.rows],
        config={"subtask": subtask, "champion": champion.id, "model": champion.model.key()},
        stage_version=EVALUATION_VERSION,
        make=make,
    )


@task(name="champion gate", task_run_name="champion gate", cache_policy=NO_CACHE)
def judge_challenger(run: Run, challenger: Manifest, champion: Champion, scored: Refs) -> Judgement:
    """Compare both on the same test rows, and publish the judgement; scored: the champion's evaluations, by subtask."""
    store = open_store(run)
    ours = challenger.inputs_by_name
    pairs = {}
    for name, ref in scored.items():
        challenging, champions = (
            json.loads(store.read(one, "scores.json"))["gated"]["counts"]
            for one in (ours[f"evaluation:evaluation {name}"], ref)
        )
        rows = read_rows(run, ours[f"split:{name} test"])
        pairs[name] = Pair(challenging, champions, metrics.score_function(run.subtask(name), rows))
    cfg, samples = run.config.promotion, run.config.evaluation.bootstrap_samples
    judged = judge(pairs, margin=cfg.margin, samples=samples, seed=run.seed("champion gate"))
    document = asdict(judged)
    store.publish(
        "judgement",
        _judgement_key(run, champion),
        name=f"run {run.id[:8]} against champion {champion.id}",
        files={"judgement.json": json.dumps(document, indent=1).encode()},
        inputs=[challenger.ref, champion.done.ref, *(scored[name] for name in sorted(scored))],
        settings=StageSettings(cfg.model_dump(mode="json"), run.config.seed, JUDGEMENT_VERSION),
        metrics={name: document[name] for name in ("promoted", "reason", "difference", "se")},
    )
    return judged


def read_judgement(store: Store, run: Run, champion: Champion) -> Judgement | None:
    """Return the earlier judgement of this run against this champion; None where there is none."""
    manifest = store.find("judgement", _judgement_key(run, champion))
    return None if manifest is None else TypeAdapter(Judgement).validate_json(store.read(manifest, "judgement.json"))


def take_place(run: Run, challenger: Manifest, champion: Champion | None, why: str) -> None:
    """Make the challenger champion, and emit `memmcl.champion.promoted`; Conflict if the champion has changed."""
    store, name = open_store(run), run.config.promotion.champion
    champions = champion.champions if champion else Champions(name, (), None)
    reign = Reign(
        run_id=run.id,
        name=run.config.name,
        since=now(),
        how="promotion",
        why=why,
        unified=challenger.metrics["unified"],
        unified_se=challenger.metrics["unified_se"],
        flow_run_id=root_flow_run_id(),
    )
    promote(store, champions, reign)
    emit_event(
        "memmcl.champion.promoted",
        resource={"prefect.resource.id": f"memmcl.champion.{name}", "prefect.resource.name": name},
        payload={"run_id": run.id, "why": why, "store": run.store["url"]},
    )


def _judgement_key(run: Run, champion: Champion) -> str:
    config = {"challenger": run.id, "champion": champion.run.id, "margin": run.config.promotion.margin}
    return cache_key("judgement", inputs=(), config=config, stage_version=JUDGEMENT_VERSION, seed=run.config.seed)
