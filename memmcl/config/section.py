"""What the sections of the configuration share: a frozen model, and the types of their values."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import CoreSchema, core_schema

from memmcl.urls import refuse_secret, schema_pattern

Share = Annotated[float, Field(ge=0, le=1)]
Place = Annotated[str, AfterValidator(refuse_secret), Field(json_schema_extra={"pattern": schema_pattern()})]
"""A path, URL or name of the hub that may be stored and shown: without credentials.

The refusal is no `ValueError`, because pydantic would repeat the value; the pattern has a Prefect server refuse it.
"""


@dataclass(frozen=True)
class OneOf:
    """Annotates a string that is one of the names of a table: `Literal` with names that are not written out twice."""

    names: Iterable[str]

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        return core_schema.literal_schema(list(self.names))


class Section(BaseModel):
    """A frozen section, which refuses unknown keys, NaN and infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
