"""What libraries and child processes print goes to a log file, while our own lines go to the terminal."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import TextIO

import typer

from flows.terminal import console, notes, output, warn
from memmcl.logs import CleanFormatter
from tasks.run import watch
from tasks.run.leftovers import LOGS, new_file

_LOGGERS = (None, "prefect.flow_runs", "prefect.task_runs")
_handler: logging.Handler | None = None
_OURS = tuple(str(Path(__file__).parents[3] / name) + os.sep for name in ("memmcl", "tasks", "flows"))


class _Warnings(logging.Handler):
    """Says warnings of our own packages; those of libraries are in the log."""

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._say = say
        self.setFormatter(CleanFormatter(None))

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno == logging.WARNING and record.pathname.startswith(_OURS):
            self._say(self.format(record))


def say_warnings() -> None:
    """Say warnings again once Prefect has set up its logs: it removes handlers, and its loggers pass nothing on."""
    for name in _LOGGERS:
        if _handler is not None:
            logging.getLogger(name).addHandler(_handler)


@contextmanager
def log_output(say: Callable[[str], None] = warn) -> Iterator[Path | None]:
    """Send stdout and stderr, of this process and of its children, to a log file; yield it, None with --verbose.

    `console`, `notes` and errors stay on the terminal; warnings of our own packages are said there, too, by `say`.
    After an error the log's name is said; a log with nothing in it is removed.
    """
    global _handler
    if output.verbose:
        yield None
        return
    path = new_file(LOGS, ".log")
    try:
        with path.open("a", buffering=1, errors="backslashreplace") as log, _moved(log) as (out, err):
            console.file = notes.file = out
            output.errors, watch.terminal_errors = err, _number(err)
            _handler = _Warnings(say)
            logging.getLogger().addHandler(_handler)
            try:
                yield path
            except BaseException as error:
                if not isinstance(error, typer.Exit) and path.stat().st_size:
                    output.before_error()
                    print(f"the log of this command is {path}", file=err, flush=True)
                raise
            finally:
                for name in _LOGGERS:
                    logging.getLogger(name).removeHandler(_handler)
                console.file, notes.file = None, None  # type: ignore[assignment]  # stdout as it is then
                _handler = output.errors = watch.terminal_errors = None
    finally:
        with suppress(OSError):
            if not path.stat().st_size:
                path.unlink()


@contextmanager
def _moved(log: TextIO) -> Iterator[tuple[TextIO, TextIO]]:
    """Have descriptors 1 and 2, and Python's streams, end in `log`; yield streams that end where these ended before."""
    kept: dict[int, int] = {}
    streams: list[TextIO] = []
    before = sys.stdout, sys.stderr
    for number, stream in enumerate(before, start=1):
        if stream is None:  # the command was started with it closed
            streams.append(os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
            continue
        with suppress(OSError, ValueError):
            stream.flush()
        if _number(stream) != number:  # somebody reads it in this process
            streams.append(stream)
            continue
        kept[number] = os.dup(number)
        streams.append(os.fdopen(os.dup(number), "w", buffering=1, encoding=stream.encoding, errors=stream.errors))
        os.dup2(log.fileno(), number)
    try:
        with redirect_stdout(log), redirect_stderr(log):
            yield streams[0], streams[1]
    finally:
        for stream in filter(None, (*before, *streams)):
            with suppress(OSError, ValueError):
                stream.flush()
        for number, descriptor in kept.items():
            os.dup2(descriptor, number)
            os.close(descriptor)


def _number(stream: TextIO) -> int | None:
    try:
        return stream.fileno()
    except (OSError, ValueError):
        return None
