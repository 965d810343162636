"""Writes `docs/reliability.md`: a part for each campaign, replaced by that campaign when it has run."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from injections import GOOD, Outcome

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
PARTS = ("s3", "disk", "run", "kills", "flips")
HEAD = """# Reliability

What was done to the product on purpose, and what a user saw. `make campaign` does it again and writes this page
(`tests/e2e/test_reliability_store.py`, `tests/e2e/test_reliability_runs.py`); every case is drawn from the seed of its
part, so the same cases come again. Seconds are those of one machine with two cores that had other work too. Where a
case ends otherwise than it should, the campaign fails, and the table says how.
"""
DIFFERS = {
    r"s3://memmcl/\w+ at http://127\.0\.0\.1:\d+": "STORE",
    r"(file://)?/tmp/mm[^/ ]+/store": "STORE",
    r"STORE/[^\s;':]+": "STORE/FILE",
    r"\b127\.0\.0\.1:\d+": "127.0.0.1:PORT",
    r"(?<![\w/:.])/(?:[\w.@+-]+/)+[\w.@+-]*": "PATH",
    r"run [0-9a-f]{8} (.*) by pid \d+ on host \S+ since [\d-]+ [\d:]+": r"run ID \1 by pid N on host NAME since TIME",
    r"\bpid[= ]\d+": "pid N",
}
"""What is taken out of lines, by pattern."""


def write_part(page: Path, name: str, text: str) -> None:
    """Put the text of one part in its place on the page, which is made when it is missing; other parts stay."""
    parts = read_parts(page.read_text()) if page.exists() else {}
    parts[name] = text.strip()
    body = "\n".join(f"<!-- part: {part} -->\n{parts[part]}\n" for part in PARTS if part in parts)
    page.write_text(f"{HEAD}\n{body}")


def read_parts(text: str) -> dict[str, str]:
    """Return the parts of a page by name."""
    pieces = re.split(r"<!-- part: (\w+) -->\n", text)[1:]
    return {name: body.strip() for name, body in zip(pieces[::2], pieces[1::2], strict=True)}


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table; cells are one line each."""
    cells = [[" ".join(str(cell).replace("|", "\\|").split()) for cell in row] for row in [header, *rows]]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])


def injections_part(title: str, words: str, kinds: Mapping[str, str], outcomes: Sequence[Outcome], seed: int) -> str:
    """Return the part for faults that were injected into work on a store.

    kinds: by name, what each does. A column for each outcome that occurred, and the longest case in seconds.
    """
    shown = [what for what in GOOD if any(one.what == what for one in outcomes)]
    rows = []
    for kind, what in kinds.items():
        mine = [one for one in outcomes if one.injection.kind == kind]
        counts = Counter(one.what for one in mine)
        wrong = len(mine) - sum(counts[name] for name in shown)
        longest = max((one.seconds for one in mine), default=0.0)
        rows.append([kind, what, len(mine), *(counts[name] for name in shown), wrong, f"{longest:.1f}"])
    totals = Counter(one.what for one in outcomes)
    sums = [totals[name] for name in shown]
    total = [len(outcomes), *sums, len(outcomes) - sum(sums), f"{max(one.seconds for one in outcomes):.1f}"]
    rows.append(["all", "", *total])
    header = ["fault", "what it does", "injections", *shown, "wrong", "longest, s"]
    bad = [f"* {one.injection}: {one.what}" for one in outcomes if not one.good]
    seconds = sum(one.seconds for one in outcomes)
    note = f"Seed {seed}; {len(outcomes)} injections in {seconds:.0f} s."
    lines = sorted({general(line) for one in outcomes for line in one.lines})
    said = ["What the user read:", "", "\n".join(f"    {line}" for line in lines)] if lines else []
    pieces = [f"## {title}", words, note, table(header, rows), "\n".join(bad), "\n".join(said)]
    return "\n\n".join(piece for piece in pieces if piece)


def general(line: str) -> str:
    """Return a line that a user read with what differs from case to case, or from machine to machine, taken out."""
    for what, instead in DIFFERS.items():
        line = re.sub(what, instead, line)
    return line
