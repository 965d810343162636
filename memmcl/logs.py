"""Log lines as they may be shown: control characters spelled out, secrets in URLs hidden."""

from __future__ import annotations

import copy
import logging

from memmcl.errors import MemmclError
from memmcl.urls import clean


class CleanFormatter(logging.Formatter):
    """Formats as `formatter` does, and cleans what comes of it.

    short: errors whose message says what to do, and whose traceback is left out.
    """

    def __init__(
        self, formatter: logging.Formatter | None, *, short: tuple[type[BaseException], ...] = (MemmclError,)
    ) -> None:
        super().__init__()
        self._formatter = formatter or logging.Formatter()
        self._short = short

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, or lines, of a record; the record stays as it is for other handlers."""
        if record.exc_info and isinstance(record.exc_info[1], self._short):
            record = copy.copy(record)
            record.exc_info = record.exc_text = None
        return clean(self._formatter.format(record))


def clean_handler(handler: logging.Handler, *, short: tuple[type[BaseException], ...] = (MemmclError,)) -> None:
    """Have a handler show clean lines; once it does, nothing changes."""
    if not isinstance(handler.formatter, CleanFormatter):
        handler.setFormatter(CleanFormatter(handler.formatter, short=short))
