"""The shapes of a base model, from its config.json alone: its linear layers and its size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memmcl.backbone.load import quiet_transformers, resolve_config
from memmcl.backbone.model_config import read_model_config, without_weights
from memmcl.errors import ModelError
from memmcl.files.folder import file_digest
from memmcl.files.untrusted import parse_yaml, read_within
from memmcl.urls import first_line

CARD_BYTES = 1 << 22  # bytes of a README.md that is read for its licence, at most

DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}  # types of stored weights, with the bytes of a number


@dataclass(frozen=True)
class Shapes:
    """A base model by its shapes.

    directory: of its config.json. licence: by its README.md or by memmcl, None if unknown. layers: how many. linear:
    (d_out, d_in) of each linear layer by module name. parameters: how many numbers it has; dtype: their type in the
    files; quantised: whether they are packed there. config_digest: sha256 of config.json.
    """

    name: str
    directory: Path
    licence: str | None
    layers: int
    linear: Mapping[str, tuple[int, int]]
    parameters: int
    dtype: str
    quantised: bool
    config_digest: str

    def size(self, dtype: str) -> int:
        """Return how many bytes its weights take in `dtype`."""
        return self.parameters * DTYPES[dtype]


def read_shapes(name_or_path: str, revision: str | None = None) -> Shapes:
    """Return the shapes of a base model, named as for `resolve_base`.

    Raises:
        ModelError: there is no such model, or it is no Llama-like decoder.
    """
    import torch
    from transformers import AutoConfig

    directory, licence = resolve_config(name_or_path, revision)
    quiet_transformers()
    try:
        read_model_config(directory)
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        model = without_weights(config)
    except Exception as error:  # a broken file can make the library raise anything
        raise ModelError(f"cannot read the config.json of {name_or_path}: {first_line(error)}") from error
    layers = getattr(getattr(model, "model", None), "layers", None)
    if not isinstance(layers, torch.nn.ModuleList):
        raise ModelError(
            f"{name_or_path} is a {type(model).__name__} without `model.layers`; memmcl needs a decoder like Llama, "
            "Qwen or Mistral"
        )
    stored = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    return Shapes(
        name=name_or_path,
        directory=directory,
        licence=licence or licence_in(directory / "README.md"),
        layers=len(layers),
        linear={
            name: (module.out_features, module.in_features)
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear)
        },
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        dtype=stored if stored in DTYPES else "float32",
        quantised=getattr(config, "quantization_config", None) is not None,
        config_digest=file_digest(directory / "config.json"),
    )


def licence_in(card: Path) -> str | None:
    """Return the licence in the front matter of a model card; None without one."""
    try:
        _, front, _ = read_within(card, CARD_BYTES).decode().split("---\n", 2)
        fields: Any = parse_yaml(front)
        licence = fields.get("license_name") if fields.get("license") == "other" else fields.get("license")
    except (OSError, ValueError, AttributeError):
        return None
    return licence.lower() if isinstance(licence, str) else None
