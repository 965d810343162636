"""The command line: a file per command."""

from flows.cli.root import app, main

__all__ = ["app", "main"]
