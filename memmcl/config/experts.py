"""The section `experts`."""

from typing import Literal, Self

from pydantic import Field, model_validator

from memmcl.config.section import Place, Section, Share


class ExpertsConfig(Section):
    """How one LoRA expert per subtask is trained."""

    steps: int = Field(120, ge=1, description="Optimiser steps per expert, its share of the warm start included")
    batch_size: int = Field(8, ge=1, description="Rows a step")
    micro_batch_size: int | None = Field(
        None, ge=1, description="Rows run at once (gradients add up); empty: the batch"
    )
    rank: int = Field(8, ge=1, le=512, description="LoRA rank r")
    alpha: float = Field(16.0, gt=0, description="LoRA alpha; updates are scaled by alpha / r")
    rslora: bool = Field(False, title="rsLoRA", description="Scale updates by alpha / sqrt(r) instead")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout in front of LoRA layers")
    init: Literal["kaiming", "osrm"] = Field(
        "kaiming", description="Where A starts: PEFT's random numbers, or the directions that other subtasks use least"
    )
    adapt_layers: str = Field(
        "top-10", pattern=r"^(all|top-[1-9]\d*)$", description="Adapted layers: all or top-N; others are computed once"
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
    gradient_checkpointing: bool = Field(False, description="Recompute activations in backward: less memory, more time")
    warm_start: float = Field(
        0.5, ge=0, lt=1, description="Share of all steps for one joint adapter, on top of which experts are trained"
    )
    anchor_weight: float = Field(0.3, ge=0, description="mu of the anchor, mu * KL(base || expert); 0: no anchor")
    anchor_every: int = Field(8, ge=1, le=16, description="An anchor on every so many steps, weighted by as much")
    anchor_delay: Share = Field(0.0, description="Share of the steps before the first anchor")
    anchor_after: float = Field(
        0.0, ge=0, lt=1, description="Share of an expert's steps that anchor it afterwards; 0: anchors while it learns"
    )
    anchor_batch_size: int = Field(4, ge=1, description="Anchor rows a step, of one other subtask in turn")
    anchor_rows: int = Field(32, ge=1, description="Anchor rows from each subtask for the others, at most")
    anchor_source: Literal["train", "texts", "corpus"] = Field(
        "train", description="Anchor rows: other subtasks' training rows, plain texts, or memmcl's corpus"
    )
    anchor_texts: Place | None = Field(None, description="With texts: their file or URL (a text column, or one a line)")
    validation_rows: int = Field(
        0, ge=0, description="Training rows of each subtask that are kept for validation; 0: none, the last step counts"
    )
    validate_every: int = Field(20, ge=1, description="Steps between two looks at the validation rows")
    patience: int = Field(0, ge=0, description="Looks without improvement before training stops early; 0: never")
    checkpoint_every: int = Field(50, ge=0, description="Steps between checkpoints to resume a training from; 0: none")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.anchor_source == "texts") != (self.anchor_texts is not None):
            raise ValueError("anchor_texts goes with anchor_source: texts, and that with it")
        if self.patience and not self.validation_rows:
            raise ValueError("patience needs validation_rows: without them nothing says when to stop")
        if self.anchor_after and not self.anchor_weight:
            raise ValueError("anchor_after needs an anchor_weight above 0")
        return self
