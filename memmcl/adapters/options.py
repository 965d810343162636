"""The fields of PEFT's adapter_config.json that memmcl reads: types, defaults and their meaning."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping
from itertools import accumulate
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from memmcl.errors import ModelError, shown
from memmcl.files.untrusted import parse_json

PATTERN = 1_000  # characters of a key of alpha_pattern or rank_pattern, at most
PATTERN_SECONDS = 10.0  # seconds for matching all modules against all keys, at most
ALPHA = 1e6  # the largest absolute value of lora_alpha
RANK = 1 << 16  # the largest rank

Alpha = Annotated[float, Field(ge=-ALPHA, le=ALPHA)]
Rank = Annotated[int, Field(ge=1, le=RANK)]


class LoraOptions(BaseModel):
    """The fields of PEFT's `LoraConfig` that matter here, of strict types; all others are in `model_extra`."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True, allow_inf_nan=False)

    peft_type: str = ""
    r: Rank = 8
    lora_alpha: Alpha = 8
    use_rslora: bool | None = None
    use_dora: bool | None = None
    modules_to_save: list[str] | None = None
    rank_pattern: dict[str, Rank] | None = None
    alpha_pattern: dict[str, Alpha] | None = None
    base_model_name_or_path: str | None = None


def read_options(config: bytes) -> LoraOptions:
    """Read adapter_config.json.

    Raises:
        ModelError: it is not a JSON object, or a field has a value that is invalid for PEFT.
    """
    try:
        fields: Any = parse_json(config)
    except ValueError as error:
        raise ModelError(f"not a PEFT adapter: adapter_config.json cannot be read: {error}") from error
    if not isinstance(fields, dict):
        raise ModelError(f"not a PEFT adapter: expected a JSON object in adapter_config.json, got {shown(fields)}")
    try:
        return LoraOptions.model_validate(fields)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))[:PATTERN]
        what = problem["msg"][0].lower() + problem["msg"][1:]
        raise ModelError(
            f"adapter_config.json: {where}: {what}, got {shown(problem['input'])}; correct it, or save the adapter anew"
        ) from error


def by_pattern(field: str, patterns: Mapping[str, float], modules: Iterable[str], default: float) -> dict[str, float]:
    """Return the value of each module: that of the first key that PEFT would match it by, else `default`.

    A key is a regular expression for the end of a module's name, after a dot: `(.*\\.)?(KEY)$`. It is matched by RE2:
    in time linear in the name for any key, and without lookaround and references to groups.

    Raises:
        ModelError: a key that RE2 cannot read, or keys that take too long.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    left = list(modules)
    values = dict.fromkeys(left, default)
    deadline = time.monotonic() + PATTERN_SECONDS
    for key, value in patterns.items():
        if len(key) > PATTERN:
            raise ModelError(
                f"{field} has a key of {len(key):,} characters, more than {PATTERN:,}; name the modules one by one"
            )
        if not left:
            break
        try:
            matches = pc.match_substring_regex(_strings(left), pattern=rf"^(?:(.*\.)?({key})$)").to_pylist()
        except (pa.ArrowException, UnicodeEncodeError) as error:
            reason = re.sub(r":[^:]*$", "", str(error).removeprefix("Invalid regular expression: "))
            raise ModelError(
                f"{field} has the key {shown(key)}, which is no pattern that memmcl matches ({reason[:80]}); write it "
                "without lookaround and references, or name the modules"
            ) from error
        values |= {module: value for module, match in zip(left, matches, strict=True) if match}
        left = [module for module, match in zip(left, matches, strict=True) if not match]
        if time.monotonic() > deadline:
            raise ModelError(
                f"{field} takes longer than {PATTERN_SECONDS:g} s to be matched; write fewer or simpler keys"
            )
    return values


def _strings(values: list[str]) -> Any:
    """Return an Arrow array of strings; `pyarrow.array` would import pandas, which takes seconds."""
    import pyarrow as pa

    encoded = [value.encode() for value in values]
    offsets = b"".join(end.to_bytes(4, "little") for end in accumulate(map(len, encoded), initial=0))
    return pa.StringArray.from_buffers(len(values), pa.py_buffer(offsets), pa.py_buffer(b"".join(encoded)))
