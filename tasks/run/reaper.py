"""Ends what is left of a local Ray when the process that started it has ended, in whatever way.

    python -I -S reaper.py [MARK]

Its standard input is a pipe from that process, and ends with it. Ray's daemons end with their parent, its workers two
seconds later, its agents a minute later; a worker that hangs would stay. All of them have MARK, `NAME=VALUE`, in their
environment; a Ray that was joined has no MARK.

Through the pipe comes a line of JSON, {"pid": ..., "message": ...}, when Ray is up, and FAREWELL when the process
leaves Ray in good order. Ray itself ends a process that talks to a raylet that has died (`_exit(1)` in its plasma
client): no farewell comes then, and the message is printed here.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

FAREWELL = b"farewell\n"
SECONDS = 10.0
"""For how long processes that are killed are looked at; one that waits for a disk cannot end."""


def marked(mark: str) -> list[int]:
    """Return the live processes of this user, but for this one, that carry the mark. Without /proc: none."""
    pids = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended, or it is another user's
            if mark.encode() in (entry / "environ").read_bytes().split(b"\0") and int(entry.name) != os.getpid():
                pids.append(int(entry.name))
    return pids


def end_marked(mark: str, seconds: float = SECONDS) -> bool:
    """Kill all processes that carry the mark, and what they start meanwhile; return whether none is left."""
    deadline = time.monotonic() + seconds
    while left := marked(mark):
        if time.monotonic() > deadline:
            return False
        for pid in left:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    return True


def listen() -> str:
    """Wait for the end of standard input; return the message to print, empty where there is none."""
    received, message, node, died = b"", "", -1, False
    while True:
        ready, _, _ = select.select([0] if node < 0 or died else [0, node], [], [])
        if 0 not in ready:
            died = True  # while the process that needs it was still there
            continue
        piece = os.read(0, 4096)
        if not piece:
            return message if died and not received.endswith(FAREWELL) else ""
        received += piece
        line, end, _ = received.partition(b"\n")
        if end and line + end != FAREWELL and not message:
            service = json.loads(line)
            message, node = str(service["message"]), _watched(service["pid"])


def _watched(pid: int) -> int:
    """Return what tells of the end of a process; -1 where it has ended, or this system has no such thing."""
    with suppress(OSError):
        return os.pidfd_open(pid) if hasattr(os, "pidfd_open") else -1
    return -1


def main(*marks: str) -> None:
    """Wait for the end of standard input, print the message if there is one, then end what carries the marks."""
    message = listen()
    if message:
        print(f"error: {message}", file=sys.stderr, flush=True)
    for mark in marks:
        end_marked(mark)


if __name__ == "__main__":
    main(*sys.argv[1:])
