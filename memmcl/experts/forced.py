"""Unlabelled texts as rows of any subtask, with teacher-forced answers that need not be right. [ours]

An anchor compares two models at answer positions; the answer itself is forced text and never in the loss. So plain
texts serve every subtask: a label picked by a hash of the text, tuples of words from the text, and fields (aspect,
target, the two things compared) that are words from the text too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, cycle, islice, zip_longest
from typing import TYPE_CHECKING, Any

from memmcl import seeds
from memmcl.errors import ConfigError, DataError
from memmcl.files.places import open_file, open_place, reading
from memmcl.suite.examples import Example, normalised
from memmcl.suite.faults import Fault, Faults
from memmcl.suite.files import by_lines, ending_of, read_files, read_lines
from memmcl.suite.prompts import Demonstration, Prompter
from memmcl.suite.rows import PLAIN, Row, text_of, usable
from memmcl.suite.subtasks import POLARITIES, Subtask
from memmcl.urls import public

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLACE = "{text}"  # the placeholder for the text in a template

DATASET = "unlabelled"  # the data set name of forced rows

_ATTRIBUTES = {
    "food": ("quality", "prices", "style_options", "general"),
    "drinks": ("quality", "prices", "style_options"),
    "restaurant": ("general", "prices", "miscellaneous"),
    "service": ("general",),
    "ambience": ("general",),
    "location": ("general",),
}
CATEGORIES = tuple(f"{entity} {attribute}" for entity, attributes in _ATTRIBUTES.items() for attribute in attributes)
"""The categories in the instruction of asqp."""

OWN_SHARES = 4  # texts for an adapter's own prompts, as a multiple of those for one other subtask
LEAST = 4  # the fewest texts for each other subtask, unless fewer rows are requested
HELD_OUT = (4, 32)  # texts that are held out: an eighth of all, at least and at most

_CHOICES = {"polarity": POLARITIES, "category": CATEGORIES}
_WORD = re.compile(r"\w[\w'’-]{0,29}")
_REACH = 64  # words of a text to pick from; later ones may be cut off the prompt


def forced_rows(subtask: Subtask, texts: Iterable[str], seed: int) -> list[Example]:
    """Return one row of `subtask` for each text (not blank), in their order, with a forced answer for gold.

    Label, words and number of tuples (one or two) follow from a hash of (seed, subtask, text) alone.
    """
    return [_forced_row(subtask, text, seed) for text in texts]


class TemplatePrompter(Prompter):
    """Prompts from a user's template, with the row's text in place of `{text}` and nothing else added.

    Raises:
        ConfigError: the template leaves no room for a text within `max_tokens`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_tokens: int, template: str) -> None:
        super().__init__(tokenizer, max_tokens)
        self._whole = template
        taken = len(self._encode(template.replace(PLACE, "")))
        if taken >= max_tokens:
            raise ConfigError(
                f"the template alone takes {taken} tokens, and data.max_prompt_tokens is {max_tokens}; raise it"
            )

    def prompts(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Return the ids of each text's prompt."""
        return [self.prompt(_TEMPLATED, Example.create(DATASET, text, "")) for text in texts]

    def _render(self, subtask: Subtask, text: str, example: Example, demonstrations: Sequence[Demonstration]) -> str:
        return self._whole.replace(PLACE, text)


_TEMPLATED = Subtask(name="template", group="SC", title="", instruction="", metric="accuracy", datasets=())


@dataclass(frozen=True)
class TextSplit:
    """Disjoint texts. own: for the adapter's own prompts; others: by subtask; held_out: to measure divergences."""

    own: tuple[str, ...]
    others: dict[str, tuple[str, ...]]
    held_out: tuple[str, ...]


def split_texts(texts: Sequence[str], others: Sequence[str], rows: int, seed: int) -> TextSplit:
    """Split distinct texts in the order of a hash of their content: at most `rows` for each of the other subtasks.

    Raises:
        DataError: too few texts.
    """
    shares = OWN_SHARES + len(others)
    least = min(LEAST, rows)
    each = min(rows, (len(texts) - _held_out(len(texts))) // shares)
    if each < least:
        needed = next(number for number in count() if (number - _held_out(number)) // shares >= least)
        raise DataError(
            f"expected at least {needed} distinct texts to anchor against {len(others)} other subtasks, got "
            f"{len(texts)}; add texts, or name fewer subtasks"
        )
    order = iter(sorted(texts, key=lambda text: (seeds.derive(seed, "deal", normalised(text)), text)))
    held_out = tuple(islice(order, _held_out(len(texts))))
    own = tuple(islice(order, OWN_SHARES * each))
    return TextSplit(own, {name: tuple(islice(order, each)) for name in others}, held_out)


def read_texts(url: str, *, storage: Mapping[str, Any] | None = None, faults: Faults | None = None) -> list[str]:
    """Return the distinct texts of a file, in its order; unusable rows are left out and counted as faults.

    url: a path or fsspec URL. A file with a known ending (`files.ENDINGS`) has a column `text`, any other is plain
    UTF-8 text, one text a line, blank lines skipped. storage: options of the S3 file system.

    Raises:
        DataError: no such file, no access, or no text in it that can be used.
    """
    faults = Faults() if faults is None else faults
    texts: dict[str, str] = {}
    rows = read_files(url, columns=("text",), storage=storage) if ending_of(url) else _plain_lines(url, storage)
    for _, text in usable(rows, lambda row: text_of(row, PLAIN), faults):
        texts.setdefault(normalised(text), text)
    if not texts:
        first = f"the first of {len(faults)} faults: {faults.first[0]}" if faults.first else "it is empty"
        raise DataError(f"expected texts in {public(url)}, one a line or a column 'text'; got none ({first})")
    return list(texts.values())


def _plain_lines(url: str, storage: Mapping[str, Any] | None) -> Iterator[Row | Fault]:
    with reading(url):
        fs, path = open_place(url, storage)
        with open_file(fs, path) as file:
            for number, line in enumerate(read_lines(by_lines(fs, file)), start=1):
                place = f"{public(url)}, line {number}"
                try:
                    text = line.decode().strip()
                except UnicodeDecodeError:
                    yield Fault(place, "encoding", "not UTF-8; convert it to UTF-8, or remove it")
                    continue
                if text:
                    yield Row(place, {"text": text})


def _held_out(texts: int) -> int:
    least, most = HELD_OUT
    return min(most, max(least, texts // 8))


def _forced_row(subtask: Subtask, text: str, seed: int) -> Example:
    def pick(*what: str | int) -> int:
        return seeds.derive(seed, "forced", subtask.name, text, *what)

    spans = _spans(text, pick("spans"))
    fields = {name: next(spans) for name in subtask.needs}
    if not subtask.is_tuple:
        return Example.create(DATASET, text, subtask.labels[pick("label") % len(subtask.labels)], fields)
    tuples = [
        tuple(
            choices[pick(name, number) % len(choices)] if (choices := _CHOICES.get(name)) else next(spans)
            for name in subtask.tuple_fields
        )
        for number in range(1 + pick("tuples") % 2)
    ]
    return Example.create(DATASET, text, dict.fromkeys(tuples), fields)


def _spans(text: str, seed: int) -> Iterator[str]:
    """Cycle through words of `text` (of four letters or more if there are two), some with the next, by a hash."""
    every = list(islice(_WORD.finditer(text), _REACH))
    longer = [word for word in every if len(word.group()) > 3]
    words = longer if len(longer) > 1 else every
    if not words:
        return cycle([text.strip()[:30]])
    spans = []
    for index, (word, after) in enumerate(zip_longest(words, words[1:])):
        chosen = seeds.derive(seed, index)
        pair = after is not None and text[word.end() : after.start()] == " " and chosen % 3 == 0
        spans.append((chosen, text[word.start() : (after if pair else word).end()]))
    return cycle([span for _, span in sorted(spans)])
