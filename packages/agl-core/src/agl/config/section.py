"""Base class and common types of the configuration's sections."""

import os
import re
from pathlib import Path
from typing import Annotated, Final, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

AnyPath = TypeVar("AnyPath", str, Path)


def expand_home(path: AnyPath) -> AnyPath:
    """`path` with a leading `~` as the home folder. Raises ValueError for the rest of what only a shell expands."""
    expanded = os.path.expanduser(path)
    if expanded.startswith("~") or re.search(r"\$\w", expanded):
        raise ValueError(f"a path is read without a shell: expected no $NAME and no ~USER of an unknown user in {path}")
    return type(path)(expanded)


TextPath = Annotated[str, AfterValidator(expand_home)]
FilePath = Annotated[Path, AfterValidator(expand_home)]

DEFAULT_PROJECT: Final = "default"
"""Project of a token that names none, and of a server without tokens."""

NAME_RULE = "letters, digits, `.`, `_` and `-`, at most 64 characters, and not `.` or `..`"


def is_name(text: str) -> bool:
    """Whether `text` may name a role, run, label or project, and so folders, files and models: NAME_RULE, in ASCII."""
    return re.fullmatch(r"[\w.-]{1,64}", text, re.ASCII) is not None and text not in (".", "..")


def _check_name(text: str) -> str:
    if not is_name(text):
        raise ValueError(f"expected a name of {NAME_RULE}")
    return text


Name = Annotated[str, AfterValidator(_check_name)]

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Reference = Annotated[str, Field(pattern=r"^[\w.]+:\w+$")]
"""`module:function`, importable from the folder in which the command runs."""


class Section(BaseModel):
    """Immutable; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, hide_input_in_errors=True)
