"""The terminal while a command works: one live picture, or a few lines; all else goes to a log file."""

from flows.cli.screen.log_file import log_output, say_warnings_of_runs
from flows.cli.screen.screen import Screen, run_screen

__all__ = ["Screen", "log_output", "run_screen", "say_warnings_of_runs"]
