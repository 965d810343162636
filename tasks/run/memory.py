"""How much memory a run takes."""

from __future__ import annotations

import threading

import psutil


class PeakMemory:
    """Samples the memory of this process and all below it (proportional set size, GiB) every 3 s of the block."""

    def __init__(self) -> None:
        self.gib = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="peak-memory", daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while True:
            self.gib = max(self.gib, tree_memory())
            if self._stop.wait(3.0):
                return


def tree_memory() -> float:
    """Return the memory in GiB that this process and all below it take, shared pages counted once."""
    total = 0
    me = psutil.Process()
    for process in [me, *me.children(recursive=True)]:
        try:
            info = process.memory_full_info()
            total += getattr(info, "pss", info.uss)
        except (psutil.NoSuchProcess, psutil.AccessDenied, FileNotFoundError):
            continue
    return total / 2**30
