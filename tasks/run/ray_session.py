"""The Ray that a command works on: a local one that ends with it, or a cluster that it joins."""

from __future__ import annotations

import math
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import ray

from memmcl.config import RayConfig
from memmcl.errors import MemmclError, ServiceError
from memmcl.urls import first_line
from tasks.run.local_ray import joined_ray, local_ray
from tasks.ui.updates import plain_worker_lines, receive_updates


@contextmanager
def ray_session(cfg: RayConfig) -> Iterator[None]:
    """Join the Ray cluster at `cfg.address`, which stays, or start a Ray here that ends with the block.

    Raises:
        ServiceError: it cannot be reached, or cannot start.
        ServiceDied: it died during the work.
    """
    if ray.is_initialized():
        yield
        return
    if cfg.address:
        _check_reachable(cfg.address)
        session = joined_ray(address=cfg.address, logging_level="warning", namespace="memmcl")
    else:
        os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "600000")  # they hold the model
        session = local_ray(
            num_cpus=math.ceil(cfg.workers * cfg.cpus_per_worker),
            include_dashboard=False,
            logging_level="warning",
            object_store_memory=256 * 2**20,
            namespace="memmcl",
        )
    plain_worker_lines()
    in_main = threading.current_thread() is threading.main_thread()
    on_sigterm = signal.getsignal(signal.SIGTERM)
    with receive_updates(), ExitStack() as stack:
        try:
            stack.enter_context(session)
        except MemmclError:
            raise
        except Exception as error:  # for a node that is not up in time Ray has no class
            where = f"reach the Ray cluster at {cfg.address}" if cfg.address else "start a local Ray"
            raise ServiceError(f"cannot {where}: {first_line(error)}; check ray.address and free memory") from error
        if in_main:
            signal.signal(signal.SIGTERM, on_sigterm)  # Ray's handler would keep Prefect from cancelling
        if not cfg.address and (gpus := float(ray.cluster_resources().get("GPU", 0))) < cfg.gpus_per_worker:
            raise ServiceError(
                f"ray.gpus_per_worker is {cfg.gpus_per_worker:g}, but Ray sees {gpus:g} GPUs on this machine; "
                "set it to 0, or name a cluster with GPUs as ray.address"
            )
        yield


def _check_reachable(address: str, seconds: float = 10.0) -> None:
    """Look whether something listens at host:port; Ray itself would try for a quarter of an hour."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return  # "auto" and the like: Ray finds out at once
    try:
        socket.create_connection((host.strip("[]"), int(port)), seconds).close()
    except (OSError, OverflowError) as error:
        raise ServiceError(
            f"nothing answers at ray.address {address} ({error}); start that cluster, correct the address, "
            "or leave it out for a local Ray"
        ) from error
