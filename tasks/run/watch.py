"""Ends the work when a service that it needs has died: with one line, whatever the work is waiting for.

Work that waits for Ray, Tune or Prefect's client would go on for minutes, and then fail with words of theirs. A thread
looks after the services. When one is gone it interrupts the main thread as Ctrl-C does, and the block raises what died.
Where that does not end the work, because it talks to the dead service, `ends_process` lets the whole process end;
nothing that is in the store is lost.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from memmcl.errors import MemmclError, ServiceDied

LOOK_EVERY = 0.1
"""Seconds between two looks at a process."""
ASK_EVERY = 5.0
"""Seconds between two looks at an address, and the seconds that an answer may take."""
UNWIND = 10.0
"""Seconds that the work gets to come to its end."""
ERROR_FIRST = 1.0
"""Seconds by which the error of a client may come before the end of the service is seen."""

AGAIN = "run the same command again: nothing that was stored is lost"

terminal_errors: int | None = None
"""The descriptor that errors are written to while stderr is a log file; None: stderr itself."""
_say: Callable[[str], None] | None = None
_farewells: list[Callable[[], None]] = []


@dataclass(frozen=True)
class Service:
    """Something that the work cannot do without.

    gone: whether it has died; message: for the user, then. patience: the seconds that it may be away; every: seconds
    between two looks.
    """

    gone: Callable[[], bool]
    message: str
    patience: float = 0.0
    every: float = LOOK_EVERY


def of_process(process: subprocess.Popen[bytes], message: str) -> Service:
    """Return a service that is a child of this process."""
    return Service(lambda: process.poll() is not None, message)


def answering(name: str, answers: Callable[[], bool], patience: float) -> Service:
    """Return a service outside this process that may leave requests unanswered for `patience` seconds."""
    message = f"{name} has not answered for {patience:.0f} s; start it again, then {AGAIN}"
    return Service(lambda: not answers(), message, patience, ASK_EVERY)


def at_address(name: str, host: str, port: int, patience: float) -> Service:
    """Return a service outside this process, at a TCP address."""

    def answers() -> bool:
        try:
            socket.create_connection((host, port), ASK_EVERY).close()
        except OSError:
            return False
        return True

    return answering(name, answers, patience)


@contextmanager
def ends_process(say: Callable[[str], None]) -> Iterator[None]:
    """Have work in this block that cannot be interrupted end with the process: exit code 1, after `say(line)`.

    What libraries print after the death of a service is dropped.
    """
    global _say
    before, _say = _say, say
    try:
        yield
    finally:
        _say = before


@contextmanager
def before_exit(farewell: Callable[[], None]) -> Iterator[None]:
    """Have `farewell` called before the process is ended because the work in this block does not end."""
    _farewells.append(farewell)
    try:
        yield
    finally:
        _farewells.remove(farewell)


@contextmanager
def watched(*services: Service, stop: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Watch services while the block runs, then call `stop`; ServiceDied says which is gone, and what to do."""
    watch = _Watch(services)
    try:
        try:
            yield
        except Exception as error:
            watch.blame(error)
            raise
        finally:
            watch.dismissed.set()
            try:
                stop()
            finally:
                watch.end()
    except BaseException as error:
        if watch.died is None:
            raise
        raise ServiceDied(watch.died) from error
    finally:
        watch.unmute()


class _Watch:
    """The thread. died: the message of the service that is gone; dismissed: look no more, services are stopped now."""

    def __init__(self, services: tuple[Service, ...]) -> None:
        self.died: str | None = None
        self._services = services
        self.dismissed = threading.Event()
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._outputs: dict[int, int] = {}
        self._in_main = threading.current_thread() is threading.main_thread()
        threading.Thread(target=self._run, name="services", daemon=True).start()

    def blame(self, error: Exception) -> None:
        """Find out whether an error comes from the end of a service: its clients may notice a moment sooner."""
        deadline = time.monotonic() + (0.0 if isinstance(error, MemmclError) else ERROR_FIRST)
        while self.died is None:
            self.died = next((one.message for one in self._services if not one.patience and one.gone()), None)
            if time.monotonic() >= deadline:
                return
            time.sleep(LOOK_EVERY)

    def end(self) -> None:
        """The block has ended: it is interrupted no more."""
        with self._lock:
            self._ended.set()

    def unmute(self) -> None:
        """Print again."""
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        for number, kept in self._outputs.items():
            os.dup2(kept, number)
            os.close(kept)
        self._outputs = {}

    def _run(self) -> None:
        self._look()
        if self.died is None:
            return
        with self._lock:
            if self._ended.is_set():
                return
            if _say is not None:
                self._mute()
            if self._in_main and not self.dismissed.is_set():
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)  # ends a blocking call, too
        if not self._ended.wait(UNWIND) and _say is not None:
            self.unmute()
            _say(self.died)
            for farewell in _farewells:
                farewell()
            os._exit(1)

    def _look(self) -> None:
        """Wait until a service is gone for longer than it may be, or there is no more need to look."""
        since: dict[Service, float] = {}
        while not self.dismissed.wait(min(one.every for one in self._services)):
            now = time.monotonic()
            for one in self._services:
                if not one.gone():
                    since.pop(one, None)
                elif now - since.setdefault(one, now) >= one.patience and not self.dismissed.is_set():
                    self.died = self.died or one.message
                    return

    def _mute(self) -> None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for number in (1, 2):
            with suppress(OSError):
                self._outputs[number] = os.dup(number)
                os.dup2(nowhere, number)
        os.close(nowhere)
