"""The section `evaluation`."""

from pydantic import Field

from memmcl.config.section import Section


class EvaluationConfig(Section):
    """How models are scored on rows."""

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
        description="Test rows of each subtask that every expert is scored on, at most; 0: no interference matrix",
    )
