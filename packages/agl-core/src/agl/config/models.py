"""`models`: the base models of a training, if it has several, and the base models of any training as one list."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field

from agl.config.engine import EngineConfig
from agl.config.roles import RoleConfig
from agl.config.section import Section, TextPath
from agl.config.train import TrainConfig


class ModelConfig(Section):
    """A base model of a training that trains several together. Roles name it in `agent_roles.<role>.model`."""

    path: TextPath
    """What `train.model` names: `smollm2`, `tiny`, a model of the Hugging Face Hub, a GGUF file, or a model folder."""
    chat_template: TextPath | None = None
    """Jinja file of its chat template; none: the model's own."""
    device: Annotated[int, Field(ge=0)] | None = None
    """Number of the accelerator on which it trains, and its in-process engine samples; none: the first."""
    engine: EngineConfig | None = None
    """Its engine, in place of the section `engine`."""


@dataclass(frozen=True, slots=True)
class Base:
    """A base model, with its engine and the roles whose adapters are on it."""

    name: str
    """For clients and engines."""
    path: str
    chat_template: str | None
    engine: EngineConfig
    roles: Mapping[str, RoleConfig]
    device: int | None = None
    """Number of its accelerator; None: that of the process."""
    is_one_of: bool = False
    """`models` names it; otherwise `train.model` does, and it is the only one."""

    @classmethod
    def only(cls, train: TrainConfig, model: str, engine: EngineConfig, roles: Mapping[str, RoleConfig]) -> Self:
        """The base model `train.model`. It is named by the last part of its path, without the revision."""
        return cls(Path(model).name.partition("@")[0], model, train.chat_template, engine, roles)

    @property
    def key(self) -> str:
        """The key of the configuration that has its path."""
        return f"models.{self.name}.path" if self.is_one_of else "train.model"

    @property
    def template_key(self) -> str:
        return f"models.{self.name}.chat_template" if self.is_one_of else "train.chat_template"

    @property
    def engine_key(self) -> str:
        return f"models.{self.name}.engine" if self.is_one_of else "engine"

    @property
    def prefix(self) -> str:
        """Of the names of what a run keeps of each of several base models."""
        return f"{self.name}." if self.is_one_of else ""

    @property
    def served(self) -> tuple[str, ...]:
        """The names, in all versions, that only its engine answers; empty: every name."""
        return (self.name, *self.roles) if self.is_one_of else ()
