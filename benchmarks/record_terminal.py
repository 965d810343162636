"""Records the terminal of a small real run, 100 x 30, checks what came out of it, and draws docs/images/terminal.svg.

    python benchmarks/record_terminal.py [--image docs/images/terminal.svg] [--config FILE]

It runs `memmcl run` in a pseudo terminal, on the tiny model of the tests or with a configuration of yours, and plays
the bytes that came out into a screen of 100 x 30. Nothing may be clipped (no line reaches the right margin and goes on,
no ellipsis), every line has to be one of ours, and no 10 s may pass without a change. The image is the screen in the
midst of the search; exit code 1 where a check fails. About two minutes on two cores.
"""

from __future__ import annotations

import argparse
import codecs
import fcntl
import io
import itertools
import os
import pty
import re
import select
import struct
import sys
import tempfile
import termios
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path

import yaml
from rich.console import Console
from rich.text import Text

COLUMNS, LINES = 100, 30
SILENCE = 10.0
"""Seconds that may pass without a change on the screen."""
ROOT = Path(__file__).parents[1]
CODE = re.compile(r"\x1b\[([?0-9;]*)([A-Za-z])|\x1b\][^\x07]*\x07|[\x00-\x1f]")
ERASED = re.compile(r"\r?(\x1b\[2K)?(\x1b\[1A\x1b\[2K)+")
OURS = (
    r"memmcl +elapsed \d+:\d\d(:\d\d)?(, about .+ left)?",
    r"(run [0-9a-f]{8}|store|log|Prefect UI) +\S.*",
    r"… (reading|opening|starting|waiting) .*",
    r"[○●✓] stage [1-4] of 4: (experts|merge search|evaluation|report)\b.*",
    r"  (warm start|joint LoRA|weak LoRA|plain expert|expert|reference|weak|selection|search|unified model"
    r"|context gate|evaluation)\b.*",
    r"  (SC|ABSA|MAST|task arithmetic|ties|tsv|unified): best .*",
    r"and \d+ more",
)
"""What lines of the picture look like, from their first column to their last."""
PICTURE = re.compile("|".join(OURS))


@dataclass
class Screen:
    """A terminal of fixed size that knows what rich writes: lines, cursor up, erasing, colours.

    overflows: characters that were written beyond the last column.
    """

    cells: list[list[tuple[str, str]]] = field(default_factory=lambda: [[] for _ in range(LINES)])
    row: int = 0
    column: int = 0
    style: str = ""
    overflows: int = 0

    def feed(self, text: str) -> None:
        """Play text with its control codes."""
        at = 0
        for code in CODE.finditer(text):
            self._write(text[at : code.start()])
            at = code.end()
            self._obey(code)
        self._write(text[at:])

    def lines(self) -> list[str]:
        """Return what stands on the screen, without colours."""
        return ["".join(character for character, _ in cells).rstrip() for cells in self.cells]

    def texts(self) -> list[Text]:
        """Return what stands on the screen, with colours."""
        return [
            Text.from_ansi(
                "".join(
                    f"{style}{''.join(character for character, _ in cells)}\x1b[0m"
                    for style, cells in itertools.groupby(row, key=itemgetter(1))
                )
            )
            for row in self.cells
        ]

    def _write(self, text: str) -> None:
        for character in text:
            if self.column >= COLUMNS:
                self.overflows += 1
                self._line_feed()
                self.column = 0
            cells = self.cells[self.row]
            cells.extend([(" ", "")] * (self.column + 1 - len(cells)))
            cells[self.column] = (character, self.style)
            self.column += 1

    def _obey(self, code: re.Match[str]) -> None:
        if code[0] == "\n":
            self._line_feed()
        elif code[0] == "\r":
            self.column = 0
        elif code[2] == "A":
            self.row = max(0, self.row - int(code[1] or 1))
        elif code[2] == "K":
            self.cells[self.row] = [] if code[1] == "2" else self.cells[self.row][: self.column]
        elif code[2] == "m":
            self.style = "" if code[1] in ("", "0") else self.style + code[0]

    def _line_feed(self) -> None:
        if self.row == LINES - 1:
            self.cells = [*self.cells[1:], []]
        else:
            self.row += 1


@dataclass
class Recording:
    """What came out of a run: (seconds since the start, bytes), and the exit code."""

    pieces: list[tuple[float, bytes]]
    seconds: float
    code: int


def record(command: Sequence[str], folder: Path) -> Recording:
    """Run a command in a pseudo terminal of 100 x 30, in a folder."""
    started = time.monotonic()
    child, terminal = pty.fork()
    if not child:
        try:
            os.chdir(folder)
            environment = {**os.environ, "TERM": "xterm-256color", "PREFECT_HOME": str(folder / "prefect")}
            for name in ("COLUMNS", "LINES", "NO_COLOR", "PREFECT_API_URL"):
                environment.pop(name, None)
            os.execvpe(command[0], list(command), environment)
        finally:  # only where there is no such command or folder: the child must not go on as its parent
            os._exit(127)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    pieces = []
    while True:
        if not select.select([terminal], [], [], 0.5)[0]:
            continue
        try:
            data = os.read(terminal, 1 << 16)
        except OSError:  # Linux's end of file
            break
        if not data:
            break
        pieces.append((time.monotonic() - started, data))
    _, status = os.waitpid(child, 0)
    return Recording(pieces, time.monotonic() - started, os.waitstatus_to_exitcode(status))


def frames(recording: Recording) -> Iterator[tuple[float, Screen]]:
    """Yield the screen each time that a picture is about to be erased for the next: then it is whole. Last, the end."""
    decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
    times, text = [], ""
    for second, data in recording.pieces:
        text += decode(data)
        times.append((len(text), second))
    screen, at = Screen(), 0
    for erased in ERASED.finditer(text):
        screen.feed(text[at : erased.start()])
        at = erased.start()
        yield next(second for end, second in times if end >= at), screen
    screen.feed(text[at:])
    yield recording.seconds, screen


def faults_of(recording: Recording) -> tuple[list[str], list[Text]]:
    """Return what is wrong with a recording, and the last screen on which a search was at work."""
    faults: dict[str, None] = {}
    drawn: list[Text] = []
    shown = frames(recording)
    last = ""
    for second, screen in shown:
        lines = screen.lines()
        if second == recording.seconds:  # no picture any more: what came out
            break
        if screen.overflows:
            faults[f"a line is longer than {COLUMNS} columns: {screen.lines()[screen.row - 1]!r}"] = None
            screen.overflows = 0
        for line in filter(None, lines):
            if "…" in line[1:]:
                faults[f"clipped: {line!r}"] = None
            if not PICTURE.fullmatch(line) and not line.startswith(" " * 4):
                faults[f"not ours: {line!r}"] = None
        last = "\n".join(lines)
        if "● stage 2" in last and ": best" in last and " candidate " in last:
            drawn = screen.texts()
    times = [0.0, *(second for second, _ in recording.pieces), recording.seconds]
    silence, since = max((after - before, before) for before, after in itertools.pairwise(times))
    if silence > SILENCE:
        faults[f"{silence:.1f} s of silence after {since:.1f} s"] = None
    if recording.code:
        faults[f"exit code {recording.code}; the end of it: {last[-500:]}"] = None
    if not drawn:
        faults["no screen shows a search at work"] = None
    return list(faults), drawn


def write_image(path: Path, screen: Sequence[Text]) -> None:
    """Draw a screen as SVG that loads nothing."""
    console = Console(width=COLUMNS, record=True, file=io.StringIO(), force_terminal=True)
    for line in screen[:-1]:
        console.print(line, soft_wrap=True)
    svg = console.export_svg(title="memmcl run", unique_id="memmcl")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(re.sub(r"\s*@font-face \{[^}]*\}", "", svg))


def tiny_run(folder: Path) -> Path:
    """Write the tiny base model and the settings of a run on it; return the settings' file."""
    sys.path.insert(0, str(ROOT / "tests/helpers"))
    from e2e_driver import tiny_config
    from tiny import make_tiny_base

    make_tiny_base(folder / "tiny-llama")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tiny_config(Path("tiny-llama"))))
    return folder / "tiny.yaml"


def main() -> None:
    """Record, check, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=Path, default=ROOT / "docs/images/terminal.svg")
    parser.add_argument("--config", type=Path, help="another configuration than that of the tiny run")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as of `memmcl run`")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="memmcl-") as name:
        folder = Path(name)
        config = asked.config.absolute() if asked.config else tiny_run(folder)
        options = [word for setting in asked.set for word in ("--set", setting)]
        recording = record([str(Path(sys.executable).with_name("memmcl")), "run", str(config), *options], folder)
    faults, screen = faults_of(recording)
    for fault in faults:
        print(fault)
    if screen:
        write_image(asked.image, screen)
    print(f"{recording.seconds:.0f} s, {sum(len(data) for _, data in recording.pieces):,} bytes, {len(faults)} faults")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
