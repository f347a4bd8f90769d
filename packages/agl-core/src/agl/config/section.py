"""What every section of the configuration shares: unknown keys are errors, values do not change, and common types."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Reference = Annotated[str, Field(pattern=r"^[\w.]+:\w+$")]
"""`module:function`, importable from the folder where the command runs."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)
