"""The table of subtasks. A new subtask is a new row here, nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from memmcl.errors import ConfigError, shown

Metric = Literal["accuracy", "macro_f1", "label_f1", "tuple_f1"]

GROUPS = ("SC", "ABSA", "MAST")
POLARITIES = ("positive", "negative", "neutral")
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

_ROWS = (
    Subtask(
        name="doc2",
        group="SC",
        title="Document polarity",
        instruction="Classify the sentiment of the review. Answer with one word: positive or negative.",
        labels=("positive", "negative"),
        metric="accuracy",
        datasets=("imdb", "yelp2"),
    ),
    Subtask(
        name="doc5",
        group="SC",
        title="Document polarity, five classes",
        instruction="Classify the sentiment of the review. "
        "Answer with one label: very negative, negative, neutral, positive or very positive.",
        labels=GRADES,
        metric="accuracy",
        datasets=("yelp5",),
    ),
    Subtask(
        name="sent2",
        group="SC",
        title="Sentence polarity",
        instruction="Classify the sentiment of the text. Answer with one word: positive or negative.",
        labels=("positive", "negative"),
        metric="accuracy",
        datasets=("mr", "sst2"),
    ),
    Subtask(
        name="sent3",
        group="SC",
        title="Sentence polarity, three classes",
        instruction="Classify the sentiment of the text. Answer with one word: positive, negative or neutral.",
        labels=POLARITIES,
        metric="accuracy",
        datasets=("twitter",),
    ),
    Subtask(
        name="sent5",
        group="SC",
        title="Sentence polarity, five classes",
        instruction="Classify the sentiment of the text. "
        "Answer with one label: very negative, negative, neutral, positive or very positive.",
        labels=GRADES,
        metric="accuracy",
        datasets=("sst5",),
    ),
    Subtask(
        name="asc",
        group="SC",
        title="Aspect polarity",
        instruction="Classify the sentiment of the text towards the aspect. "
        "Answer with one word: positive, negative or neutral.",
        labels=POLARITIES,
        needs=("aspect",),
        metric="accuracy",
        datasets=("asc_lap14", "asc_rest14"),
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
    Subtask(
        name="implicit",
        group="MAST",
        title="Implicit sentiment",
        instruction="Classify the implied sentiment of the text towards the aspect. "
        "Answer with one word: positive, negative or neutral.",
        labels=POLARITIES,
        needs=("aspect",),
        metric="accuracy",
        figurative=True,
        datasets=("implicit",),
    ),
    Subtask(
        name="compsent",
        group="MAST",
        title="Comparative opinion",
        instruction="Decide whether the text finds object a better or worse than object b. "
        "Answer with one word: better or worse.",
        labels=("better", "worse"),
        needs=("object_a", "object_b"),
        metric="accuracy",
        datasets=("compsent19",),
    ),
    Subtask(
        name="irony",
        group="MAST",
        title="Irony",
        instruction="Decide whether the text is ironic. Answer with one word: irony or non_irony.",
        labels=("irony", "non_irony"),
        metric="label_f1",
        positive_label="irony",
        figurative=True,
        datasets=("irony",),
    ),
    Subtask(
        name="emotion",
        group="MAST",
        title="Emotion",
        instruction="Name the emotion of the text. Answer with one word: anger, joy, optimism or sadness.",
        labels=("anger", "joy", "optimism", "sadness"),
        metric="macro_f1",
        datasets=("emotion",),
    ),
    Subtask(
        name="hate",
        group="MAST",
        title="Hate speech",
        instruction="Decide whether the text is hate speech. Answer with one word: hate or non-hate.",
        labels=("hate", "non-hate"),
        metric="macro_f1",
        datasets=("hate",),
    ),
    Subtask(
        name="offensive",
        group="MAST",
        title="Offensive language",
        instruction="Decide whether the text is offensive. Answer with one word: offensive or non-offensive.",
        labels=("offensive", "non-offensive"),
        metric="macro_f1",
        datasets=("offensive",),
    ),
    Subtask(
        name="stance",
        group="MAST",
        title="Stance",
        instruction="Decide which stance the text takes towards the target. "
        "Answer with one word: against, favor or none.",
        labels=("against", "favor", "none"),
        needs=("target",),
        metric="macro_f1",
        datasets=("stance",),
        unscored_labels=("none",),
    ),
)

SUBTASKS: dict[str, Subtask] = {subtask.name: subtask for subtask in _ROWS}


def get_subtask(name: str) -> Subtask:
    """Return the subtask called `name`.

    Raises:
        ConfigError: there is none.
    """
    if name not in SUBTASKS:
        raise ConfigError(
            f"unknown subtask {shown(name)}; known ones: {', '.join(SUBTASKS)}; one of your own goes under data.custom"
        )
    return SUBTASKS[name]
