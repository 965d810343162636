"""A local Ray that nobody else reaches, and a Ray that is told no credentials.

Ray has no public setting for either: what it reads is set here, and tests look at the sockets and files of a run.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

from ray._private import ray_constants
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]  # its stub leaves it out
from ray.tune.execution import class_cache

TOKEN = "RAY_AUTH_TOKEN"


@contextmanager
def private() -> Iterator[None]:
    """Have `ray.init` in this block start a Ray on 127.0.0.1 alone, with a token that is in no file.

    Ray listens on all interfaces where it supports clusters of several nodes, exports its metrics to whoever asks, and
    keeps the token that its processes know each other by in the home folder, readable by all.
    """
    supported = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    os.environ.setdefault("RAY_enable_metrics_collection", "0")
    if TOKEN not in os.environ and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ[TOKEN] = secrets.token_hex(32)
        AuthenticationTokenLoader.instance().reset_cache()  # it may have seen another, or none
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = supported


def withhold_credentials() -> None:
    """Have Tune tell its workers no credentials: it writes what it tells them to a log that all can read.

    They have them from where every worker has: from the environment that their node was started with.
    """
    names = class_cache.ENV_VARS_TO_PROPAGATE
    class_cache.ENV_VARS_TO_PROPAGATE = {name for name in names if not name.startswith("AWS_")}
