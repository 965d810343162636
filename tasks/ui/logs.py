"""The log of a run, in the terminal and in the Prefect UI: clean lines; there alone our own errors have tracebacks."""

from __future__ import annotations

import logging

from httpx import HTTPError
from prefect.logging import get_run_logger
from prefect.logging.configuration import ensure_logging_setup
from prefect.logging.handlers import APILogHandler, PrefectConsoleHandler
from ray.exceptions import RayError

from memmcl.errors import MemmclError
from memmcl.logs import clean_handler

SHORT = (MemmclError, RayError, HTTPError)
"""Errors of ours and of services: their message says it."""


def clean_logs() -> None:
    """Clean what Prefect's handlers show, in whatever process tasks run; the run history keeps tracebacks."""
    ensure_logging_setup()
    known = logging.getLogger().manager.loggerDict.values()
    for logger in (logging.getLogger(), *(one for one in known if isinstance(one, logging.Logger))):
        for handler in logger.handlers:
            if isinstance(handler, PrefectConsoleHandler | APILogHandler):
                clean_handler(handler, short=SHORT if isinstance(handler, PrefectConsoleHandler) else ())


log = get_run_logger
"""Returns the logger of the Prefect run, which shows in its UI."""
