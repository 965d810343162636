"""What reaches the terminal: text that others wrote does nothing there, and no URL shows its secrets.

Names of subtasks, files, columns and labels, answers of models and errors of libraries all end here. Results are
printed through `console`, what is said beside them through `notes`, errors by `fail`; log lines of a run go through
`memmcl.logs`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any, TextIO

from pydantic import BaseModel
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from memmcl.errors import bounded
from memmcl.text import visible
from memmcl.urls import clean, redacted


class Terminal(Console):
    """A console that spells out control characters, hides secrets in URLs, and takes [brackets] for what they are."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"highlight": False, "markup": False, "emoji": False, **options})

    def render_str(self, text: str, **options: Any) -> Text:
        """Return `text` for printing; tables measure their columns by it."""
        return super().render_str(clean(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yield the pieces of anything that is printed; rich's own control codes are apart from its text."""
        for segment in super().render(renderable, options):
            shown = segment.text if segment.control else visible(segment.text)
            yield segment if shown == segment.text else Segment(shown, segment.style)


@contextmanager
def _clean_refusals() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        refusal: Any = error  # typer's own class is private
        if hasattr(error, "format_message") and isinstance(getattr(error, "message", None), str):
            refusal.message = bounded(clean(refusal.message))
        raise


class Commands(TyperGroup):
    """A group of commands whose refusals of arguments, which typer prints by itself, are clean too."""

    make_context = _clean_refusals()(TyperGroup.make_context)  # reads the arguments of the group
    invoke = _clean_refusals()(TyperGroup.invoke)  # reads those of the command, and runs it


@dataclass
class Output:
    """What a command shall print, and where.

    json: one document on stdout instead of text. quiet: the result alone. verbose: also what libraries print. errors:
    the terminal's stderr while stderr is a log file. before_error: called before an error is printed.
    """

    json: bool = False
    quiet: bool = False
    verbose: bool = False
    errors: TextIO | None = None
    before_error: Callable[[], None] = lambda: None

    def choose(self, *, json: bool = False, quiet: bool = False, verbose: bool = False) -> None:
        """Print so from now on."""
        self.json, self.quiet, self.verbose = json, quiet, verbose
        console.quiet, notes.quiet = json, json or quiet

    def answer(self, document: object) -> None:
        """With --json, print the one result of a command; without, it has been printed for people."""
        if self.json:
            plain = redacted(json.loads(json.dumps(document, default=_plain)))
            print(visible(json.dumps(plain, ensure_ascii=False, indent=1)), file=console.file, flush=True)


def table(*columns: str, rows: Iterable[Iterable[str]] = (), title: str | None = None) -> Table:
    """Return a table without lines."""
    new = Table(*columns, box=None, header_style="bold", title=title, title_justify="left")
    for row in rows:
        new.add_row(*row)
    return new


console = Terminal()
notes = Terminal()
output = Output()


def warn(message: str) -> None:
    """Print a warning, in one line, where errors go."""
    _say("warning:", "yellow", message)


def fail(message: str) -> None:
    """Print an error, in one line, where errors go."""
    output.before_error()
    _say("error:", "red", message)


def _say(label: str, colour: str, message: str) -> None:
    line = Text.assemble((label, colour), " ", bounded(clean(" ".join(message.split()))))
    Terminal(stderr=True, file=output.errors).print(line, soft_wrap=True)


def _plain(value: object) -> object:
    """Return what JSON has for a value that it does not know."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Mapping):
        return dict(value)
    return sorted(value) if isinstance(value, set | frozenset) else str(value)
