"""The base model that stays loaded in a process, for all its stages and candidates."""

from __future__ import annotations

from functools import lru_cache

from pydantic import BaseModel, ConfigDict

from memmcl.backbone.activations import Activations, activations_directory
from memmcl.backbone.forward import Backbone
from memmcl.backbone.load import BaseRef, check_device, load_base, load_tokenizer, resolve_base
from memmcl.errors import ModelError
from memmcl.suite.prompts import Prompter


class Base(BaseModel):
    """The base model, the same in every process.

    digest: sha256 (hex) of its files. dtype, device: how it is run. layers: its decoder layers. split: the lowest layer
    that any adapter changes; the layers below are the frozen trunk.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    digest: str
    licence: str | None
    dtype: str
    device: str
    layers: int
    split: int


class ModelSpec(BaseModel):
    """A base model, and how a process runs it: torch's threads, tokens of the longest prompt."""

    model_config = ConfigDict(frozen=True)

    base: Base
    revision: str | None = None
    threads: int = 1
    max_prompt_tokens: int

    def key(self) -> dict[str, object]:
        """Return the settings that every stage's numbers depend on: weights, dtype, device, split, prompt length."""
        return {
            **self.base.model_dump(include={"digest", "dtype", "device", "split"}),
            "max_prompt_tokens": self.max_prompt_tokens,
        }


def resident(spec: ModelSpec) -> tuple[Backbone, Prompter]:
    """Return the base model and the prompter, loaded once per process.

    Callers that change the backbone's weights restore them before they return.
    """
    return _backbone(spec.base, spec.revision, spec.threads), resident_prompter(spec)


def resident_activations(spec: ModelSpec) -> Activations:
    """Return the trunk's activations of the resident model, in this process's memory and on this machine's disk."""
    return _activations(spec.base, spec.revision, spec.threads)


def resident_prompter(spec: ModelSpec) -> Prompter:
    """Return the prompter without loading the model."""
    return _prompter(spec.base, spec.revision, spec.max_prompt_tokens)


def find_base(base: Base, revision: str | None) -> BaseRef:
    """Find the base on this machine.

    Raises:
        ModelError: it is not there, or has another digest than at the start of the run.
    """
    local = resolve_base(base.name, revision)
    if local.digest != base.digest:
        raise ModelError(
            f"{base.name} has the digest {local.digest[:12]} here, the run was started with {base.digest[:12]}; "
            "put the same model on every machine, or start a new run"
        )
    return local


@lru_cache(maxsize=1)
def _local(base: Base, revision: str | None) -> BaseRef:
    return find_base(base, revision)


@lru_cache(maxsize=1)
def _backbone(base: Base, revision: str | None, threads: int) -> Backbone:
    import torch

    torch.set_num_threads(threads)
    local = _local(base, revision)
    tokenizer = load_tokenizer(local)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return Backbone(load_base(local, base.dtype, check_device(base.device)), pad, base.split)


@lru_cache(maxsize=1)
def _activations(base: Base, revision: str | None, threads: int) -> Activations:
    backbone = _backbone(base, revision, threads)
    return Activations(backbone, activations_directory(_local(base, revision), backbone))


@lru_cache(maxsize=1)
def _prompter(base: Base, revision: str | None, max_tokens: int) -> Prompter:
    return Prompter(load_tokenizer(_local(base, revision)), max_tokens)
