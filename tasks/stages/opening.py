"""Opening a run: its id and inputs, its lease, and whether it is finished."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from prefect.runtime import deployment

from memmcl import seeds
from memmcl.backbone.load import resolve_device, resolve_dtype
from memmcl.backbone.resident import Base, resident_prompter
from memmcl.config import RunConfig
from memmcl.errors import ConfigError, ServiceDied, shown
from memmcl.experts import train
from memmcl.merge.table import check_search
from memmcl.search import plan
from memmcl.store import Lease, Manifest
from tasks.run.inputs import Inputs, find_inputs
from tasks.run.journal import Pinned, note_run
from tasks.run.repair import drop_damaged_records
from tasks.run.runtime import Run, open_store
from tasks.stages import anchors, contexts, data, evaluate, merge, references, report, weak
from tasks.stages.anchors import anchors_key, choose_anchors
from tasks.stages.data import data_digests, rows_digest
from tasks.stages.experts import warm_key
from tasks.ui import history

logger = logging.getLogger(__name__)
STAGE_VERSIONS = {
    "split": data.STAGE_VERSION,
    "anchors": anchors.STAGE_VERSION,
    "expert": train.STAGE_VERSION,
    "reference": references.REFERENCE_VERSION,
    "search": plan.STAGE_VERSION,
    "unified": merge.UNIFIED_VERSION,
    "gate": contexts.GATE_VERSION,
    "weak": weak.STAGE_VERSION,
    "evaluation": evaluate.EVALUATION_VERSION,
    "report": report.REPORT_VERSION,
}
"""They are part of a run's id, so that a newer stage makes it another run."""


def open_run(config: RunConfig, inputs: Inputs | None = None, pins: Callable[[Run], Pinned] | None = None) -> Run:
    """Return the run of this configuration, data and base; a MemmclError says what is missing or wrong.

    Its id is the digest of the configuration (but for where it runs), the rows, the base's weights, and the anchor rows
    and the warm start that its experts are trained with. inputs: if read already. pins: those of an earlier run.
    """
    search = config.search
    check_search(search.method, search.parameters, search.genes, search.bounds[0])
    inputs = inputs or find_inputs(config)
    ref, layers, splits = inputs.base, inputs.layers, inputs.splits
    device = resolve_device(config.model.device, config.ray.gpus_per_worker)
    adapted = layers if config.experts.adapt_layers == "all" else int(config.experts.adapt_layers.removeprefix("top-"))
    base = Base(
        name=ref.name,
        digest=ref.digest,
        licence=ref.licence,
        device=device,
        dtype=resolve_dtype(config.model.dtype, device),
        layers=layers,
        split=max(0, layers - adapted),
    )
    run = Run(id="", config=config, base=base, store=inputs.store.spec, command=history.started_by())
    prompter = resident_prompter(run.model)
    for name in config.data.subtasks:
        prompter.check(run.subtask(name))
    run = run.model_copy(update={"pinned": pins(run) if pins else Pinned()})
    anchor_rows = anchors_key(run, choose_anchors(run, splits) if run.pinned.anchors is None else None)
    identity = {
        "config": config.what(),
        "data": data_digests(splits),
        "base": base.model_dump(mode="json", exclude={"licence"}),
        "stages": STAGE_VERSIONS,
        "anchors": anchor_rows,
        "warm": warm_key(run, splits),
    }
    return run.model_copy(update={"id": seeds.digest(identity), "rows": rows_digest(splits, anchor_rows)})


def check_place(config: RunConfig) -> None:
    """Refuse a deployment's relative paths by a ConfigError: a worker runs flows in a temporary folder."""
    if not deployment.id:
        return
    for key, place in {"store.url": config.store.url, **_places_of_rows(config)}.items():
        if "://" not in place and not Path(place).is_absolute():
            raise ConfigError(
                f"{key} of a deployment must be absolute, got {shown(place)}: a worker runs flows in folders that it "
                "removes; give s3://bucket/folder or an absolute path"
            )


def _places_of_rows(config: RunConfig) -> dict[str, str]:
    """Return setting -> file or directory that rows are read from."""
    data, texts = config.data, config.experts.anchor_texts
    places = {} if data.source == "embedded" else {"data.source": data.source}
    places |= {"experts.anchor_texts": texts} if texts else {}
    sources = {f"data.custom.{number}.data": subtask.data for number, subtask in enumerate(data.custom)}
    sources |= {f"data.sources.{name}": source for name, source in data.sources.items()}
    for setting, source in sources.items():
        files = ("path",) if source.dataset else ("path", "train", "weak", "test")
        places |= {f"{setting}.{name}": place for name in files if (place := getattr(source, name))}
    return places


def finished(run: Run) -> Manifest | None:
    """Return the run's last artifact if the run is finished, and all its artifacts are whole.

    Damage is logged as one warning; the stages of the run make again what is damaged.
    """
    closure = open_store(run).run_closure(run.id)
    if not closure.problems:
        return closure.root
    first, *others = closure.problems
    more = f", and {len(others)} more" if others else ""
    logger.warning(
        "run %s was finished, but is damaged and will be repaired: %s: %s%s", run.id[:8], first.where, first.what, more
    )
    return None


def refuse_second(run: Run) -> None:
    """Raise LeaseHeld when another live process works on the same run, before anything is started for this one."""
    Lease(open_store(run), run.id, {}).refuse_if_held()


@contextmanager
def held(run: Run) -> Iterator[Lease]:
    """Hold the run's lease, or raise LeaseHeld; flow runs that died with it are closed in the history."""
    store = open_store(run)
    with Lease(store, run.id, {"flow_run_id": history.root_flow_run_id()}) as lease:
        history.close_abandoned(lease)
        for path in drop_damaged_records(store, run.id):
            logger.warning("%s: damaged, removed", path)
        note_run(store, run)
        try:
            yield lease
        except BaseException as error:
            # Tasks on Ray ended without a state where a service died, or where a signal or a cancellation came.
            if isinstance(error, ServiceDied) or not isinstance(error, Exception):
                history.close_interrupted()
            raise
