"""What a writer does before it relies on an object that is there already; `gc.py` explains the whole protocol.

It touches the object, waits until no garbage collection is at work, and only then looks whether it is there and whole.
"""

from __future__ import annotations

from memmcl.errors import StoreAccessError
from memmcl.store.documents import Documents
from memmcl.store.lease import wait_for_collection


def reuse(store: Documents, path: str) -> bool:
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
