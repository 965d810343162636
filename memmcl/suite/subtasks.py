"""The table of subtasks. A new subtask is a new row here, nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from memmcl.errors import ConfigError, shown

Metric = Literal["accuracy", "macro_f1", "label_f1", "tuple_f1"]

GROUPS = ("SC", "ABSA", "MAST")
POLARITIES = ("positive", "negative", "neutral")
BINARY = ("positive", "negative")
GRADES = ("very negative", "negative", "neutral", "positive", "very positive")


@dataclass(frozen=True, kw_only=True)
class Subtask:
    """One sentiment subtask.

    name: short, unique, lower case.
    group: one of `GROUPS`; its lower-case form is the folder of the data sets.
    title: for tables and reports.
    instruction: the system prompt.
    labels: every label an answer may be; empty where answers are tuples.
    tuple_fields: what a tuple holds, in order; empty where answers are labels. A field called "polarity"
        takes one of `POLARITIES`.
    needs: the fields beside the text without which the question cannot be asked, as "aspect" or "target".
    metric: how one data set is scored; a subtask's score is the mean over its data sets.
    positive_label: the one label whose F1 is the score (`label_f1` only).
    figurative: whether the meaning is implicit or not literal.
    datasets: names of SentiEval's data sets.
    unscored_labels: labels whose F1 `macro_f1` leaves out of its mean (stance: "none").
    """

    name: str
    group: str
    title: str
    instruction: str
    labels: tuple[str, ...] = ()
    tuple_fields: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    metric: Metric
    positive_label: str | None = None
    figurative: bool = False
    datasets: tuple[str, ...]
    unscored_labels: tuple[str, ...] = ()

    @property
    def is_tuple(self) -> bool:
        """Whether an answer is a list of tuples instead of one label."""
        return bool(self.tuple_fields)

    @property
    def scored_labels(self) -> tuple[str, ...]:
        """The labels whose F1 the metric averages; empty for accuracy and for tuples."""
        if self.metric == "macro_f1":
            return tuple(label for label in self.labels if label not in self.unscored_labels)
        return (self.positive_label,) if self.positive_label is not None else ()


@dataclass(frozen=True, kw_only=True)
class Pairs(Subtask):
    """Rows that are a prompt and its answer, both shown to the model to the last character.

    An answer is free text, so that likelihood is its only measure. No subtask of the catalogue is one.
    """


PAIRS = Pairs(
    name="pairs",
    group=GROUPS[0],
    title="Prompts and answers",
    instruction="",
    tuple_fields=("answer",),
    metric="tuple_f1",
    datasets=("pairs",),
)


def _choice(
    group: str, name: str, title: str, question: str, labels: tuple[str, ...], *datasets: str, **more: Any
) -> Subtask:
    """Return a subtask whose answer is one of `labels`; its instruction is the question, followed by them.

    datasets: one of the subtask's name where none is named. more: other fields of `Subtask`.
    """
    unit = "label" if " " in labels[0] else "word"
    instruction = f"{question} Answer with one {unit}: {', '.join(labels[:-1])} or {labels[-1]}."
    more["datasets"] = datasets or (name,)
    return Subtask(group=group, name=name, title=title, instruction=instruction, labels=labels, **more)


_sc = partial(_choice, "SC", metric="accuracy")
_mast = partial(_choice, "MAST", metric="macro_f1")
_ROWS = (
    _sc("doc2", "Document polarity", "Classify the sentiment of the review.", BINARY, "imdb", "yelp2"),
    _sc("doc5", "Document polarity, five classes", "Classify the sentiment of the review.", GRADES, "yelp5"),
    _sc("sent2", "Sentence polarity", "Classify the sentiment of the text.", BINARY, "mr", "sst2"),
    _sc("sent3", "Sentence polarity, three classes", "Classify the sentiment of the text.", POLARITIES, "twitter"),
    _sc("sent5", "Sentence polarity, five classes", "Classify the sentiment of the text.", GRADES, "sst5"),
    _sc(
        "asc",
        "Aspect polarity",
        "Classify the sentiment of the text towards the aspect.",
        POLARITIES,
        "asc_lap14",
        "asc_rest14",
        needs=("aspect",),
    ),
    Subtask(
        name="uabsa",
        group="ABSA",
        title="Aspects and their polarity",
        instruction="List the aspects and their sentiment (positive, negative or neutral) as "
        "[('aspect', 'sentiment'), ...]. Answer [] if there are none.",
        tuple_fields=("aspect", "polarity"),
        metric="tuple_f1",
        datasets=("uabsa_laptop14", "uabsa_rest14", "uabsa_rest15", "uabsa_rest16"),
    ),
    Subtask(
        name="aste",
        group="ABSA",
        title="Aspects, opinions and polarity",
        instruction="List the aspects, opinion words and sentiment (positive, negative or neutral) as "
        "[('aspect', 'opinion', 'sentiment'), ...].",
        tuple_fields=("aspect", "opinion", "polarity"),
        metric="tuple_f1",
        datasets=("aste_laptop14", "aste_rest14", "aste_rest15", "aste_rest16"),
    ),
    Subtask(
        name="asqp",
        group="ABSA",
        title="Categories, aspects, opinions and polarity",
        instruction="List the categories, aspects (NULL if not named), opinion words and sentiment "
        "(positive, negative or neutral) as [('category', 'aspect', 'opinion', 'sentiment'), ...]. "
        "Categories: food quality, food prices, food style_options, food general, drinks quality, drinks prices, "
        "drinks style_options, restaurant general, restaurant prices, restaurant miscellaneous, service general, "
        "ambience general, location general.",
        tuple_fields=("category", "aspect", "opinion", "polarity"),
        metric="tuple_f1",
        datasets=("asqp_rest15", "asqp_rest16"),
    ),
    _mast(
        "implicit",
        "Implicit sentiment",
        "Classify the implied sentiment of the text towards the aspect.",
        POLARITIES,
        metric="accuracy",
        needs=("aspect",),
        figurative=True,
    ),
    _mast(
        "compsent",
        "Comparative opinion",
        "Decide whether the text finds object a better or worse than object b.",
        ("better", "worse"),
        "compsent19",
        metric="accuracy",
        needs=("object_a", "object_b"),
    ),
    _mast(
        "irony",
        "Irony",
        "Decide whether the text is ironic.",
        ("irony", "non_irony"),
        metric="label_f1",
        positive_label="irony",
        figurative=True,
    ),
    _mast("emotion", "Emotion", "Name the emotion of the text.", ("anger", "joy", "optimism", "sadness")),
    _mast("hate", "Hate speech", "Decide whether the text is hate speech.", ("hate", "non-hate")),
    _mast("offensive", "Offensive language", "Decide whether the text is offensive.", ("offensive", "non-offensive")),
    _mast(
        "stance",
        "Stance",
        "Decide which stance the text takes towards the target.",
        ("against", "favor", "none"),
        needs=("target",),
        unscored_labels=("none",),
    ),
)

SUBTASKS: dict[str, Subtask] = {subtask.name: subtask for subtask in _ROWS}


def get_subtask(name: str) -> Subtask:
    """Return the subtask called `name`. Raises ConfigError if there is none."""
    if name not in SUBTASKS:
        raise ConfigError(
            f"unknown subtask {shown(name)}; known ones: {', '.join(SUBTASKS)}; one of your own goes under data.custom"
        )
    return SUBTASKS[name]
