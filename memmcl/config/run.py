"""The whole tree."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from memmcl.config.curriculum import CurriculumConfig
from memmcl.config.data import DataConfig
from memmcl.config.evaluation import EvaluationConfig
from memmcl.config.experts import ExpertsConfig
from memmcl.config.model import ModelConfig
from memmcl.config.promotion import PromotionConfig
from memmcl.config.ray import RayConfig
from memmcl.config.search import SearchConfig
from memmcl.config.section import Section
from memmcl.config.store import StoreConfig


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
