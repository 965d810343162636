"""Cancelling: a signal or a click in the Prefect UI ends the work on Ray soon, and the history says so.

Prefect's worker cancels a run by SIGTERM, which Prefect's own handler turns into an exception. Where that strikes
inside a call into Ray it is lost: Ray lets KeyboardInterrupt through, nothing else. And where no worker supervises
the process (`memmcl run`, or a worker that died), nobody acts on a run that is Cancelling. A thread takes care of both.
"""

from __future__ import annotations

import _thread
import contextvars
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from uuid import UUID

from prefect import State
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType
from prefect.exceptions import TerminationSignal
from prefect.runtime import deployment
from prefect.states import Cancelled

from tasks.ui.history import root_flow_run_id

LOOK_EVERY = 5.0
"""Seconds between two looks at the flow run's state."""
WORKER_GRACE = 20.0
"""Seconds that a deployment's worker gets to end its process, before the process does it itself."""
SIGNAL_GRACE = 1.0
"""Seconds that Prefect's exception gets to come through."""


class CancelRequested(BaseException):
    """Somebody cancelled the flow run, and no worker acted on it."""


def cancelled() -> State:
    """Return the state in which a cancelled flow ends."""
    return Cancelled(message="Cancelled; what was finished is in the store. Run it again to go on.")


@contextmanager
def cancellable() -> Iterator[None]:
    """Have SIGTERM, and the flow run's state Cancelling, end the block whatever it waits for.

    Works in the main thread; elsewhere the block just runs.

    Raises:
        TerminationSignal: SIGTERM came.
        CancelRequested: the run is Cancelling.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    watch = _Watch(root_flow_run_id(), WORKER_GRACE if deployment.id else 0.0)
    try:
        with watch:
            yield
    except KeyboardInterrupt:
        if watch.terminated:
            raise TerminationSignal(signal.SIGTERM) from None
        if watch.requested:
            raise CancelRequested from None
        raise


class _Watch:
    """A thread that interrupts the main thread when SIGTERM came or the run is Cancelling."""

    def __init__(self, run_id: str | None, worker_grace: float) -> None:
        self.terminated = False
        self.requested = False
        self._run_id = run_id
        self._worker_grace = worker_grace
        self._ended = threading.Event()
        self._reader, self._writer = socket.socketpair()
        here = contextvars.copy_context()  # Prefect's settings are in it, or the thread would start a server of its own
        self._thread = threading.Thread(target=here.run, args=(self._run,), name="cancellation", daemon=True)

    def __enter__(self) -> None:
        self._writer.setblocking(False)
        self._before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        signal.set_wakeup_fd(self._before)
        self._writer.close()  # the thread's read ends
        self._thread.join()
        self._reader.close()

    def _run(self) -> None:
        self._reader.settimeout(LOOK_EVERY)
        cancelling_since: float | None = None
        while not self._ended.is_set():
            signals = b""
            try:
                signals = self._reader.recv(64)
            except TimeoutError:
                if cancelling_since is None and self._is_cancelling():
                    cancelling_since = time.monotonic()
            self.terminated = signal.SIGTERM in signals and not self._ended.wait(SIGNAL_GRACE)
            waited = -1.0 if cancelling_since is None else time.monotonic() - cancelling_since
            self.requested = waited >= self._worker_grace
            if self.terminated or self.requested:
                _thread.interrupt_main()
                return

    def _is_cancelling(self) -> bool:
        if self._run_id is None:
            return False
        with suppress(Exception), get_client(sync_client=True) as client:  # a server that is away may be back soon
            state = client.read_flow_run(UUID(self._run_id)).state
            return state is not None and state.type is StateType.CANCELLING
        return False
