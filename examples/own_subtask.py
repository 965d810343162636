"""Define a subtask of your own, and search a merge that is good at it and at one of the catalogue.

    python examples/own_subtask.py BASE TICKETS SENT2 OUT

TICKETS and SENT2 are folders of two LoRA adapters: one trained for the urgency of tickets, one for sentence polarity.
The same block of settings, as YAML under `data.custom`, adds the subtask to a whole run (docs/data.md).
"""

import json
import sys
from pathlib import Path

import memmcl

TICKETS = {
    "name": "tickets",
    "group": "MAST",
    "title": "Urgency of a ticket",
    "instruction": "Say how urgent the ticket is. Answer with one label: urgent, can wait or spam.",
    "labels": ["urgent", "can wait", "spam"],
    "metric": "macro_f1",
    "data": {"path": "tickets.csv"},  # where a run reads its rows; a search on weak rows does not open it
}
ROWS = [
    {"subtask": "tickets", "text": "The lift is stuck with people inside.", "label": "urgent"},
    {"subtask": "tickets", "text": "Water is running out of the ceiling.", "label": "urgent"},
    {"subtask": "tickets", "text": "Please repaint the hall some day.", "label": "can wait"},
    {"subtask": "tickets", "text": "The clock in the lobby is a minute slow.", "label": "can wait"},
    {"subtask": "tickets", "text": "You have won a cruise, click here.", "label": "spam"},
    {"subtask": "tickets", "text": "Cheap watches, today only.", "label": "spam"},
    {"subtask": "sent2", "text": "The soup was lovely.", "label": "positive"},
    {"subtask": "sent2", "text": "The waiter was rude.", "label": "negative"},
]


def main(base: str, tickets: str, sent2: str, out: str) -> None:
    """Write the weak rows to OUT/weak.jsonl and the best merge to OUT/merged."""
    weak = Path(out) / "weak.jsonl"
    weak.parent.mkdir(parents=True, exist_ok=True)
    weak.write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    result = memmcl.search_merge(
        base,
        {"tickets": tickets, "sent2": sent2},
        weak=str(weak),
        evaluations=12,
        settings={"data": {"subtasks": ["tickets", "sent2"], "custom": [TICKETS]}, "search": {"fitness": "choice"}},
    )
    print(result)
    print("retention by subtask:", dict(result.winner.values))
    result.save(f"{out}/merged")


if __name__ == "__main__":
    main(*sys.argv[1:])
