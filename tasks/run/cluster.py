"""A cluster that was joined: does every node have what tasks need there?"""

from __future__ import annotations

import logging
import os
import socket
import time
import uuid
from collections.abc import Sequence
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from memmcl.backbone.resident import ModelSpec, find_base
from memmcl.config import RayConfig
from memmcl.errors import MemmclError, ServiceError
from memmcl.search.problem import store_at
from memmcl.store import Store
from memmcl.version import __version__
from tasks.ui.logs import log

SECONDS = 120.0
ROOM_SECONDS = 10.0
"""For how long nodes may be on their way: just started, or lost and coming back."""
GROUP = "ray.io/node-group"
"""The label that KubeRay and Ray's launcher give to nodes of a group, which may grow."""


def check_nodes(cfg: RayConfig, spec: dict[str, str | None], model: ModelSpec) -> None:
    """Make sure that every node that can take work has this memmcl, the store of this spec, and the base model.

    Nodes share no disk: each reads a mark that is written here, or a `file://` store would lose what they train. A node
    that joins later is not checked; what fails there is retried elsewhere. A ServiceError names what a node lacks, or
    says that none has room (`check_room`).
    """
    check_room(cfg)
    mark = uuid.uuid4().hex
    store = store_at(spec)
    token = store.swap_pointer(f"checks/{mark}", {"mark": mark}, None)
    try:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        nodes, checks = [node for node in nodes if node["Resources"].get("CPU", 0) >= cfg.cpus_per_worker], []
        for node in nodes:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            look = _look.options(num_cpus=0, scheduling_strategy=there, max_retries=1)
            checks.append(look.remote(spec, model, mark, __version__))
        for node, check in zip(nodes, checks, strict=True):
            try:
                lacking = ray.get(check, timeout=SECONDS)
            except (ray.exceptions.RayError, TimeoutError) as error:
                lacking = f"its check failed ({str(error).strip().splitlines()[-1]}); is memmcl installed there?"
            if lacking:
                raise ServiceError(f"Ray node {node['NodeManagerHostname']}: {lacking}")
    finally:
        store.delete_pointer(f"checks/{mark}", token)
    able = _with_room(nodes, cfg)
    log().info("Ray cluster %s: %d nodes that take work", cfg.address, len(able))
    if not able:
        log().warning("%s; waiting for the cluster to grow", _lack(cfg, nodes))


def check_room(cfg: RayConfig) -> None:
    """Raise a ServiceError if no node has room for a worker, nor may one be added: Ray would wait for ever."""
    deadline = time.monotonic() + ROOM_SECONDS
    while True:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        if _with_room(nodes, cfg) or any(node["Labels"].get(GROUP) for node in nodes):
            return
        if time.monotonic() > deadline:
            raise ServiceError(
                f"{_lack(cfg, nodes)}; lower ray.cpus_per_worker or ray.gpus_per_worker, or start such a node, then "
                "run the same command again: no result is lost"
            )
        time.sleep(0.5)


def place() -> str:
    """Return where this task runs, for its log: host, the Ray node's id, and the GPUs that Ray gave it."""
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES")
    node = ray.get_runtime_context().get_node_id()[:8] if ray.is_initialized() else "none"
    return f"{socket.gethostname()}, node {node}" + (f", GPU {gpus}" if gpus else "")


def _with_room(nodes: Sequence[dict[str, Any]], cfg: RayConfig) -> list[dict[str, Any]]:
    """Return the nodes that a worker fits on while nothing else is there."""
    least = {"CPU": cfg.cpus_per_worker, "GPU": cfg.gpus_per_worker}
    return [node for node in nodes if all(node["Resources"].get(kind, 0) >= count for kind, count in least.items())]


def _lack(cfg: RayConfig, nodes: Sequence[dict[str, Any]]) -> str:
    sizes = sorted({tuple(node["Resources"].get(kind, 0) for kind in ("CPU", "GPU")) for node in nodes}, reverse=True)
    there = ", ".join(f"{cpus:g} CPUs and {gpus:g} GPUs" for cpus, gpus in sizes)
    return (
        f"no Ray node has {cfg.cpus_per_worker:g} CPUs and {cfg.gpus_per_worker:g} GPUs for a worker; "
        f"the nodes there are have {there or 'nothing'}"
    )


@ray.remote
def _look(spec: dict[str, str | None], model: ModelSpec, mark: str, version: str) -> str:
    """Return what this node lacks; empty when nothing."""
    logging.getLogger("memmcl").setLevel(logging.ERROR)
    if version != __version__:
        return f"has memmcl {__version__}, the run was started with {version}; install the same version everywhere"
    try:
        value, _ = Store.from_spec(spec).read_pointer(f"checks/{mark}")
        if value is None:
            return f"does not see the store {spec['url']}; nodes share no disk: use an s3:// URL as store.url"
        find_base(model.base, model.revision)
    except MemmclError as error:
        return str(error)
    return ""
