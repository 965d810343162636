"""What a writer does before it relies on an object that is there already; `gc.py` explains the whole protocol.

It touches the object, waits until no garbage collection is at work, and only then looks whether it is there and whole.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from memmcl.errors import LeaseHeld, StoreAccessError

if TYPE_CHECKING:
    from memmcl.store.store import Store

logger = logging.getLogger(__name__)
COLLECTING = "gc"
"""The lease of a garbage collection. No run has this id: those are hexadecimal digests."""
PAUSE = 0.1  # seconds between two looks at a collection that is at work


def reuse(store: Store, path: str) -> bool:
    """Touch an object, and return once no garbage collection can take it away; False when there is none.

    A store that this process may only read is not touched: nothing can be published on top of it.
    """
    try:
        there = store.objects.touch(path)
    except StoreAccessError:
        return True
    if there:
        wait_for_collection(store)
    return there


def wait_for_collection(store: Store) -> None:
    """Return at once when no garbage collection is at work, else when it has ended or its process has died."""
    from memmcl.store.lease import Lease

    warned = False
    while store.objects.read(f"pointers/leases/{COLLECTING}.json") is not None:
        try:
            with Lease(store, COLLECTING, {}):  # a dead collection's: taken over, so that it cannot wake up and go on
                return
        except LeaseHeld:
            if not warned:
                logger.warning("waiting for the garbage collection of %s to end", store.url)
            warned = True
            time.sleep(PAUSE)
