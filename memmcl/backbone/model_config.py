"""The configuration of a model directory, checked within bounds before transformers builds anything from it."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from memmcl.backbone.tensors import Header, read_header
from memmcl.errors import ModelError, shown
from memmcl.files.untrusted import JSON_BYTES, parse_json, read_within

LAYERS = 1_000  # layers of a model, at most
EXPERTS = 65_536  # experts of a model, in all layers together, at most
INDEX_BYTES = 1 << 26  # bytes of the index of a sharded model, at most
TOKENIZER_BYTES = 1 << 27  # bytes of each file of a tokenizer, and of a chat template, at most

_TOKENIZER = ("tokenizer*.json", "tokenizer.model", "chat_template.jinja", "special_tokens_map.json", "*.txt")
_COUNT = re.compile(r"(?P<layers>layers?$)|(?P<experts>experts$)")


def read_model_config(directory: Path) -> dict[str, Any]:
    """Return the content of config.json.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON object, or counts more layers or experts than any model has.
    """
    fields = parse_json(read_within(directory / "config.json", JSON_BYTES), JSON_BYTES, infinity=True)
    if not isinstance(fields, dict):
        raise ValueError(f"expected a JSON object, got {shown(fields)}")
    largest = {"layers": 1, "experts": 1}
    for key, value in _numbers(fields):
        if (match := _COUNT.search(key)) and match.lastgroup:
            largest[match.lastgroup] = max(largest[match.lastgroup], value)
            if largest["layers"] > LAYERS or math.prod(largest.values()) > EXPERTS:
                raise ValueError(
                    f"{shown(key)} is {shown(value)}, and memmcl builds {LAYERS:,} layers and {EXPERTS:,} experts at "
                    "most"
                )
    return fields


def check_model_files(name: str, directory: Path) -> None:
    """Refuse files that do not fit together, or name other models, before a long load fails.

    Raises:
        ModelError: a damaged or too large file, an index that names other files, or an adapter.
    """
    if (directory / "adapter_config.json").exists():  # transformers would load what that names instead
        raise ModelError(f"cannot load {name}: it holds an adapter; name the base model that it was trained on")
    weights = {path.name for path in directory.glob("*.safetensors")}
    path = directory / "config.json"
    try:
        fields = read_model_config(directory)
        named = fields.get("transformers_weights")
        if named is not None and (not isinstance(named, str) or named not in weights):
            raise ValueError(f"transformers_weights is {shown(named)}, and no such file lies beside it")
        for path in sorted(directory.glob("*.safetensors.index.json")):
            _check_index(path, weights)
        for path in sorted(directory.glob("*.safetensors")):
            _header(path)
        for pattern in _TOKENIZER:
            for path in directory.glob(pattern):
                if path.stat().st_size > TOKENIZER_BYTES:
                    raise ValueError(f"it has more than {TOKENIZER_BYTES:,} bytes")
    except OSError as error:
        raise ModelError(f"cannot load {name}: {path.name} cannot be read ({error.strerror}); get it anew") from error
    except ValueError as error:
        raise ModelError(f"cannot load {name}: {path.name} is damaged ({error}); get the file anew") from error


def numbers_held(directory: Path) -> int:
    """Return how many numbers the weights in a directory are; of quantised weights, how many bits.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is damaged, or there are more layers than tensors.
    """
    fields = read_model_config(directory)
    headers = [_header(path) for path in sorted(directory.glob("*.safetensors"))]
    layers, tensors = fields.get("num_hidden_layers"), sum(len(header.tensors) for header in headers)
    if type(layers) is int and layers > tensors:
        raise ValueError(f"its configuration describes {layers:,} layers, its weights are {tensors:,} tensors")
    if fields.get("quantization_config") is not None:
        return sum(8 * header.size for header in headers)
    return sum(tensor.elements for header in headers for tensor in header.tensors.values())


def without_weights(config: Any) -> Any:
    """Return the model that a configuration of transformers describes, on the device "meta", without numbers."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=False)


def check_size(config: Any, held: int) -> None:
    """Refuse a configuration of transformers for a larger model than weights of `held` numbers can fill.

    Raises:
        ValueError: it is larger; or whatever transformers raises on a configuration that it cannot build.
    """
    described = sum(parameter.numel() for parameter in without_weights(config).parameters())
    if described > 2 * held:  # fewer missing numbers are reported by name after the load
        raise ValueError(f"its configuration describes {described:,} numbers, its weights hold {held:,}")


def _header(path: Path) -> Header:
    with path.open("rb") as file:
        return read_header(file)


def _check_index(path: Path, weights: set[str]) -> None:
    fields = parse_json(read_within(path, INDEX_BYTES), INDEX_BYTES)
    places = fields.get("weight_map") if isinstance(fields, dict) else None
    if not isinstance(places, dict):
        raise ValueError("it has no weight_map")
    for place in places.values():
        if not isinstance(place, str) or place not in weights:
            raise ValueError(f"it names {shown(place)}, and no such file lies beside it")


def _numbers(fields: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the numbers in nested objects by key."""
    for key, value in fields.items():
        if isinstance(value, dict):
            yield from _numbers(value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield key, value
