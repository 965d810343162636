"""One thread of numpy's BLAS while a strategy asks and learns: the cores are the workers'.

More than one gains nothing on matrices of a few hundred rows, takes cores from the evaluation of candidates, and adds
up in another order, so that a proposal would depend on how many cores the driver has.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from threadpoolctl import ThreadpoolController

_LOCK = threading.Lock()


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Give BLAS one thread, and at the end as many as before.

    The limit is the process's, and threadpoolctl silently ignores a second thread that sets it meanwhile. So searches
    of one process ask by turns.
    """
    with _LOCK, _controller().limit(limits=1, user_api="blas"):
        yield


@cache
def _controller() -> ThreadpoolController:
    """Return what knows the BLAS libraries of this process; numpy's is there since numpy was imported."""
    return ThreadpoolController()
