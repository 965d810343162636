"""Groups of commands with the same options for what is printed: --json; --quiet and --verbose where work is done."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any, TypeVar

import typer

from flows.terminal import Commands, output
from memmcl.errors import UsageError

Command = TypeVar("Command", bound=Callable[..., Any])
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document, and nothing else")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print the result alone, and errors")]
Verbose = Annotated[
    bool, typer.Option("--verbose", help="Print all that libraries and workers say, instead of writing it to a log")
]


def with_output(
    function: Callable[..., Any], *, json: bool = True, talks: bool = False, works: bool = False
) -> Callable[..., Any]:
    """Return a command with the options --json, --quiet and --verbose, which choose what `flows.terminal` prints.

    json: whether it prints a result. talks: whether it says more than its result. works: whether it also loads models
    or starts services, which have much to say.
    """
    known = inspect.signature(function, eval_str=True)
    added = {"as_json": Json} if json else {}
    added |= {"quiet": Quiet} if talks or works else {}
    added |= {"verbose": Verbose} if works else {}
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)
        for name, annotation in added.items()
    ]

    @wraps(function)
    def command(*arguments: Any, **values: Any) -> Any:
        as_json, quiet, verbose = (values.pop(name, False) for name in ("as_json", "quiet", "verbose"))
        if quiet and verbose:
            raise UsageError("--quiet and --verbose exclude each other; leave one out")
        output.choose(json=as_json, quiet=quiet, verbose=verbose)
        return function(*arguments, **values)

    signature = known.replace(parameters=[*known.parameters.values(), *options])
    command.__signature__ = signature  # type: ignore[attr-defined]  # what typer reads
    command.__annotations__ = {name: parameter.annotation for name, parameter in signature.parameters.items()}
    return command


class App(typer.Typer):
    """A group of commands that have the options of `with_output`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"cls": Commands, "no_args_is_help": True, **options})

    def command(
        self, name: str | None = None, *, json: bool = True, talks: bool = False, works: bool = False, **options: Any
    ) -> Callable[[Command], Command]:
        """Add a command; json, talks, works: as of `with_output`. The function stays as it is."""

        def add(function: Command) -> Command:
            super(App, self).command(name, **options)(with_output(function, json=json, talks=talks, works=works))
            return function

        return add
