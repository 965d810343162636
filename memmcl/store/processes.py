"""What tells one process from all others, on this machine and on others."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any


def identity() -> dict[str, Any]:
    """Return what tells this process from all others: host, pid namespace, pid, and when it started."""
    try:
        namespace = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        namespace = ""
    pid = os.getpid()
    return {"host": socket.gethostname(), "pid_namespace": namespace, "pid": pid, "process_start": process_start(pid)}


def process_start(pid: int) -> str | None:
    """Return `BOOT:TICKS`: in which boot of which machine process `pid` was started, and when in that boot.

    No other holder of the pid shares it. None when there is no such process, or only its unreaped remains. BOOT is
    empty where the system does not tell it.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # the name may hold blanks
    except OSError:
        return None
    state, ticks = fields[0], fields[19]  # proc(5): fields 3 (state) and 22 (starttime)
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    return None if state in "ZX" else f"{boot}:{ticks}"
