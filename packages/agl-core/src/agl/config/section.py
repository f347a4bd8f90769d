"""Base class and common types of the configuration's sections."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Reference = Annotated[str, Field(pattern=r"^[\w.]+:\w+$")]
"""`module:function`, importable from the folder in which the command runs."""


class Section(BaseModel):
    """Immutable; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)
