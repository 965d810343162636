"""The process that outlives a command: it says what the command could not say any more, and is silent otherwise."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator

import pytest

from tasks.run import reaper

SAID = "the node of the local Ray died"


@pytest.fixture
def node() -> Iterator[subprocess.Popen[bytes]]:
    """A process in the place of a raylet."""
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


@pytest.fixture
def waiting(node: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """A reaper that was told of the node."""
    command = [sys.executable, "-I", "-S", reaper.__file__, "MEMMCL_TEST=nobody"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write(json.dumps({"pid": node.pid, "message": SAID}).encode() + b"\n")
        process.stdin.flush()
        time.sleep(0.5)  # it reads
        yield process


def said(waiting: subprocess.Popen[bytes], last: bytes = b"") -> str:
    """Let the pipe end, after `last`; return what was said then."""
    _, err = waiting.communicate(last, timeout=20)
    return err.decode()


def test_a_process_that_ray_ended_because_its_node_died_is_spoken_for(
    node: subprocess.Popen[bytes], waiting: subprocess.Popen[bytes]
) -> None:
    node.kill()
    time.sleep(0.3)
    assert said(waiting) == f"error: {SAID}\n"


def test_a_process_that_said_it_itself_is_not(node: subprocess.Popen[bytes], waiting: subprocess.Popen[bytes]) -> None:
    node.kill()
    time.sleep(0.3)
    assert said(waiting, reaper.FAREWELL) == ""


def test_a_process_that_was_killed_while_its_node_lived_is_not(waiting: subprocess.Popen[bytes]) -> None:
    assert said(waiting) == ""


def test_a_ray_that_never_came_up_is_nothing_to_speak_of_and_what_is_marked_ends() -> None:
    """The farewell is all that comes then."""
    mark = f"MEMMCL_TEST={uuid.uuid4().hex}"
    name, _, value = mark.partition("=")
    with subprocess.Popen(["sleep", "60"], env={**os.environ, name: value}) as left:
        command = [sys.executable, "-I", "-S", reaper.__file__, mark]
        ended = subprocess.run(command, input=reaper.FAREWELL, capture_output=True, timeout=20)
        assert (ended.returncode, ended.stderr) == (0, b"")
        assert left.wait(5) == -signal.SIGKILL
