"""One thread of numpy's BLAS while a strategy asks and learns: the cores are the workers'.

More than one gains nothing on matrices of a few hundred rows, and costs twice: a search's threads wait, spinning, for
cores that evaluate candidates, and sums in another order are other numbers, so that a proposal would depend on how many
cores the driver has.
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

    The limit is the process's, and threadpoolctl lets one thread of the process set it at a time: any other's is
    silently without effect, and ends with the first one's. So searches of one process ask by turns.
    """
    with _LOCK, _controller().limit(limits=1, user_api="blas"):
        yield


@cache
def _controller() -> ThreadpoolController:
    """Return what knows the BLAS libraries of this process; numpy's is there since numpy was imported."""
    return ThreadpoolController()
