"""What the sections of the configuration share: a frozen model, and the types of their values."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from memmcl.urls import refuse_secret, schema_pattern

Share = Annotated[float, Field(ge=0, le=1)]
Place = Annotated[str, AfterValidator(refuse_secret), Field(json_schema_extra={"pattern": schema_pattern()})]
"""A path, URL or name of the hub that may be stored and shown: without credentials.

The refusal is no `ValueError`, because pydantic would repeat the value; the pattern has a Prefect server refuse it.
"""


class Section(BaseModel):
    """A frozen section, which refuses unknown keys, NaN and infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
