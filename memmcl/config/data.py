"""The section `data`: which subtasks, where their rows lie, how many are used."""

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from memmcl.config.section import Place, Section
from memmcl.errors import shown


class SourceConfig(Section):
    """Where the rows of one subtask lie: one file of all rows, a file per split, or a Hugging Face data set."""

    path: Place | None = Field(None, description="JSONL, CSV or Parquet: path, glob or URL; dealt to splits by content")
    train: Place | None = Field(None, description="File of training rows; with dataset, the name of that split")
    weak: Place | None = Field(None, description="File of weak rows; with dataset, the name of that split")
    test: Place | None = Field(None, description="File of test rows; with dataset, the name of that split")
    dataset: Place | None = Field(None, description="Hugging Face data set by name, or a local directory of one")
    subset: str | None = Field(None, description="Configuration of the Hugging Face data set")
    revision: str | None = Field(None, description="Branch, tag or commit of the Hugging Face data set")
    columns: dict[str, str] = Field(default_factory=dict, description="Column of each of our fields (text, label, ...)")
    labels: dict[str, str] = Field(default_factory=dict, description="A label as it is in the data to the one it means")

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        splits = [name for name in ("train", "weak", "test") if getattr(self, name)]
        if self.path and (self.dataset or splits):
            raise ValueError(f"path holds all rows: leave out {', '.join(splits) or 'dataset'}, or path")
        if not self.path and not self.dataset and not {"train", "test"} <= set(splits):
            raise ValueError("expected path, or train and test (and weak, if there is one), or dataset")
        if not self.dataset and (self.subset or self.revision):
            raise ValueError("subset and revision belong to dataset; give that too")
        return self


class SubtaskConfig(Section):
    """A subtask of your own: what is asked, what an answer may be, how it is scored, and where its rows lie."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]{0,30}$", description="Short, lower case, unlike those of the catalogue")
    group: Literal["SC", "ABSA", "MAST"] = Field(description="The group that it is merged with in stage 1")
    title: str = Field("", max_length=60, description="For tables and the report; the name if empty")
    instruction: str = Field(min_length=1, max_length=4000, description="The instruction; say which answers there are")
    labels: tuple[str, ...] = Field((), description="Every label that an answer may be; or tuple_fields")
    tuple_fields: tuple[str, ...] = Field(
        (), description="What each tuple of an answer holds, in order; a field called polarity is checked"
    )
    needs: tuple[str, ...] = Field((), description="Columns beside the text that the question needs, as aspect, target")
    metric: Literal["accuracy", "macro_f1", "label_f1", "tuple_f1"] | None = Field(
        None, description="Empty: accuracy for labels, tuple_f1 for tuples"
    )
    positive_label: str | None = Field(None, description="The label whose F1 is the score; for label_f1 only")
    figurative: bool = Field(False, description="Whether the meaning is implicit or not literal; counts as difficulty")
    data: SourceConfig = Field(description="Where its rows lie")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if bool(self.labels) == bool(self.tuple_fields):
            raise ValueError(f"subtask {self.name}: give either labels or tuple_fields")
        for what, values in (("labels", self.labels), ("tuple_fields", self.tuple_fields), ("needs", self.needs)):
            if any(value != value.strip() or not value for value in values):
                raise ValueError(f"subtask {self.name}: {what} must be words without spaces around them")
            if len({value.lower() for value in values}) != len(values):
                raise ValueError(f"subtask {self.name}: each of {what} may be named once, whatever its case")
        reserved = {"text", "label"} & {*self.needs, *self.tuple_fields}
        if reserved:
            raise ValueError(f"subtask {self.name}: {reserved.pop()} is a field of every row; call it something else")
        if len(self.labels) == 1:
            raise ValueError(f"subtask {self.name}: give at least two labels")
        if bool(self.tuple_fields) != (self.scored_by == "tuple_f1"):
            raise ValueError(f"subtask {self.name}: metric tuple_f1 goes with tuple_fields, the others with labels")
        if (self.scored_by == "label_f1") != (self.positive_label is not None):
            raise ValueError(f"subtask {self.name}: positive_label goes with metric label_f1, and label_f1 with it")
        if self.positive_label is not None and self.positive_label not in self.labels:
            raise ValueError(f"subtask {self.name}: positive_label must be one of {', '.join(self.labels)}")
        return self

    @property
    def scored_by(self) -> Literal["accuracy", "macro_f1", "label_f1", "tuple_f1"]:
        """The metric, where none is given the usual one."""
        return self.metric or ("tuple_f1" if self.tuple_fields else "accuracy")


class DataConfig(Section):
    """Where rows come from, and how many of each split are used."""

    source: Place = Field(
        "embedded",
        min_length=1,
        description="'embedded' (memmcl's corpus), or a directory or URL in SentiEval's layout",
    )
    subtasks: tuple[str, ...] = Field(
        ("sent2", "asc", "uabsa", "aste", "irony", "emotion"),
        min_length=1,
        description="Subtasks of this run: names of the catalogue (memmcl data list), and of your own",
    )
    custom: tuple[SubtaskConfig, ...] = Field((), description="Subtasks of your own; name them in subtasks too")
    sources: dict[str, SourceConfig] = Field(
        default_factory=dict, description="Subtasks of the catalogue whose rows lie elsewhere than in source"
    )
    train_rows: int = Field(400, ge=1, description="Training rows a subtask, at most")
    weak_rows: int = Field(48, ge=1, description="Weak rows a subtask, for the search and the context gate, at most")
    selection_rows: int = Field(
        0, ge=0, description="Further weak rows, unseen by searches, that decide between finalists; 0: the weak rows do"
    )
    weak_source: Literal["labelled", "pseudo"] = Field(
        "labelled",
        description="Labels of weak rows: those of the data, or pseudo: each expert labels plain text of its subtask",
    )
    pseudo_pool: float = Field(
        3.0, ge=1, le=100, description="With pseudo: texts labelled for each weak row; the most confident are kept"
    )
    test_rows: int = Field(100, ge=1, description="Test rows a subtask, at most; for reporting only")
    pool_rows: int = Field(
        20_000, ge=1, description="Rows of a data set and split that are drawn from; a larger one is sampled by content"
    )
    max_prompt_tokens: int = Field(192, ge=16, le=8192, description="A query's tokens; a longer text is cut at its end")
    max_characters: int = Field(20_000, ge=100, description="A longer text is a fault in the data")
    on_error: Literal["fail", "skip"] = Field(
        "fail", description="When rows cannot be used: stop and say which, or leave them out, counted in the report"
    )
    on_overlap: Literal["error", "drop"] = Field(
        "error", description="When a test text of a data set is also in its train or weak rows: stop, or drop it there"
    )

    @field_validator("subtasks")
    @classmethod
    def _distinct(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(names)) != len(names):
            raise ValueError("each subtask may be named once")
        return names

    @model_validator(mode="after")
    def _all_named(self) -> Self:
        own = [subtask.name for subtask in self.custom]
        if len(set(own)) != len(own):
            raise ValueError("each subtask of your own needs a name of its own")
        for name in own:
            if name not in self.subtasks:
                raise ValueError(f"custom subtask {shown(name)} is not in data.subtasks: add it there, or remove it")
            if name in self.sources:
                raise ValueError(f"custom subtask {shown(name)} has its data with it: remove it from data.sources")
        for name in self.sources:
            if name not in self.subtasks:
                raise ValueError(
                    f"data.sources names {shown(name)}, which is not in data.subtasks: add it, or remove it"
                )
        return self
