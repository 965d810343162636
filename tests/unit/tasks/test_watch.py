"""The watch on services: work ends with one line, whatever it waits in; else the process does."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from memmcl.errors import ServiceDied, StoreError
from tasks.run import watch
from tasks.run.watch import Service, at_address, of_process, watched

SAID = "the service died; do something"


@pytest.fixture(autouse=True)
def _sigint() -> Iterator[None]:
    """The watch interrupts by SIGINT, which is ignored where a shell started the tests in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def service() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "600"]) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("wait", [lambda: time.sleep(600), threading.Event().wait, signal.pause])
@pytest.mark.timeout(60)
def test_a_death_ends_what_waits(wait: object, service: subprocess.Popen[bytes]) -> None:
    threading.Timer(0.1, service.kill).start()
    stopped = []
    with pytest.raises(ServiceDied, match=SAID), watched(of_process(service, SAID), stop=lambda: stopped.append(1)):
        wait()  # type: ignore[operator]
    assert stopped == [1]


def test_an_error_that_comes_with_the_death_is_the_service_s(service: subprocess.Popen[bytes]) -> None:
    def lose(error: Exception) -> None:
        with watched(of_process(service, SAID)):
            service.kill()
            service.wait()
            raise error

    for error in (ConnectionError("connection lost"), StoreError("the same, in words of ours")):
        with pytest.raises(ServiceDied, match=SAID) as caught:
            lose(error)
        assert caught.value.__cause__ is not None


@pytest.mark.parametrize("error", [StoreError("no space"), KeyboardInterrupt(), ValueError("a defect")])
def test_what_comes_while_the_service_lives_stays_as_it_is(
    error: BaseException, service: subprocess.Popen[bytes]
) -> None:
    with pytest.raises(type(error)) as caught, watched(of_process(service, SAID), stop=service.kill):
        raise error
    assert caught.value is error


def test_a_service_that_is_stopped_at_the_end_has_not_died(service: subprocess.Popen[bytes]) -> None:
    def stop() -> None:
        service.kill()
        service.wait()
        time.sleep(3 * watch.LOOK_EVERY)

    with watched(of_process(service, SAID), stop=stop):
        pass


@pytest.mark.timeout(60)
def test_what_others_run_may_be_away_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    away = threading.Event()
    looks = []

    def gone() -> bool:
        looks.append(away.is_set())
        return away.is_set()

    with watched(Service(gone, SAID, patience=3600, every=0.01)):
        away.set()
        while not any(looks):
            time.sleep(0.01)
        away.clear()
    away.set()
    with pytest.raises(ServiceDied, match=SAID), watched(Service(gone, SAID, patience=0.05, every=0.01)):
        signal.pause()
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
        asked = at_address("the cluster", "127.0.0.1", port, 30)
        assert not asked.gone()
    assert asked.gone()
    assert asked.message.startswith("the cluster has not answered for 30 s; start it again, then run the same command")


STUCK = """
import subprocess, sys, threading
from tasks.run import watch
watch.UNWIND = 0.5
service = subprocess.Popen(["sleep", "600"])
threading.Timer(0.2, service.kill).start()
def say(line): print("error:", line, file=sys.stderr, flush=True)
print("before")
with watch.ends_process(say), watch.watched(watch.of_process(service, "it died")):
    while True:
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print("a library's own words", file=sys.stderr, flush=True)
            subprocess.run(["sh", "-c", "echo from below; echo from below >&2"])
"""


@pytest.mark.timeout(60)
def test_work_that_does_not_end_is_ended_with_the_process_and_nothing_else_is_said() -> None:
    ended = subprocess.run([sys.executable, "-c", STUCK], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, "before\n", "error: it died\n")


@pytest.mark.timeout(60)
def test_the_output_is_back_when_the_work_has_ended() -> None:
    program = STUCK.replace("while True", "if True").replace("UNWIND = 0.5", "UNWIND = 60.0")
    program += "    raise ConnectionError('lost')\n"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.stdout == "before\n"
    assert "words" not in ended.stderr
    assert ended.stderr.splitlines()[-1] == "memmcl.errors.ServiceDied: it died"
