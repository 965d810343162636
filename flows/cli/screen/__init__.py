"""The terminal while a command works: one live picture, or a few lines; all else goes to a log file."""

from flows.cli.screen.log_file import log_output, say_warnings
from flows.cli.screen.screen import run_screen
from flows.cli.screen.state import Screen

__all__ = ["Screen", "log_output", "run_screen", "say_warnings"]
