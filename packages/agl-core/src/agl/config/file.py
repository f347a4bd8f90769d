"""The whole configuration: one YAML file as one typed tree, in agl-core so that checking it does not need torch."""

import difflib
from pathlib import Path
from typing import Any, Final, Self

import yaml
from pydantic import AliasChoices, BaseModel, Field, ValidationError, model_validator

from agl.config.canary import CanaryConfig, GuardConfig, PromoteConfig
from agl.config.collector import CollectorConfig
from agl.config.engine import EngineConfig, LaunchConfig
from agl.config.gateway import GatewayConfig, TimeoutsConfig, UpstreamConfig
from agl.config.judge import JudgeConfig
from agl.config.queue import QueueConfig
from agl.config.ray import RayConfig, RayRunnersConfig, RayTrainerConfig
from agl.config.roles import AgentRoles, RoleConfig
from agl.config.sampling import TrafficSamplingConfig
from agl.config.section import Section
from agl.config.server import ServerConfig
from agl.config.sft import SftConfig, SftTracesConfig
from agl.config.source import expand_variables, read_yaml
from agl.config.tls import TlsConfig
from agl.config.train import SamplingConfig, TrainConfig
from agl.errors import ConfigError
from agl.secret_url import SecretUrl

DEFAULT_STORE_URI: Final = SecretUrl("sqlite:///agl.db")
"""The store if the user names none."""


class Config(Section):
    """The whole file."""

    store_uri: SecretUrl = Field(
        default=DEFAULT_STORE_URI, validation_alias=AliasChoices("store_uri", "lightning_store_uri")
    )
    """The store; `lightning_store_uri` is another name for this key."""
    queue_uri: SecretUrl | None = None
    """`redis://host:port` of a durable queue between receivers and store."""
    rewards: dict[str, float] = Field(default_factory=dict)
    """Weight of each reward dimension in the scalar reward; empty: the mean of the dimensions."""
    agent_roles: AgentRoles = Field(default_factory=AgentRoles)
    server: ServerConfig = Field(default_factory=ServerConfig)
    collector: CollectorConfig = Field(default_factory=CollectorConfig)
    queue: QueueConfig = Field(default_factory=QueueConfig)
    gateway: GatewayConfig = Field(default_factory=GatewayConfig)
    sampling: TrafficSamplingConfig | None = None
    engine: EngineConfig = Field(default_factory=EngineConfig)
    train: TrainConfig | None = None
    ray: RayConfig = Field(default_factory=RayConfig)
    sft: SftConfig | None = None
    judge: JudgeConfig | None = None
    canary: CanaryConfig = Field(default_factory=CanaryConfig)

    @model_validator(mode="after")
    def _weighs_its_judge(self) -> Self:
        if self.judge is not None and self.rewards and "judge" not in self.rewards:
            raise ValueError("rewards has no weight for the dimension judge: add one, which may be 0")
        unknown = set(self.judge.roles).difference(self.agent_roles.roles) if self.judge else ()
        if unknown:
            known = ", ".join(self.agent_roles.roles) or "none"
            raise ValueError(f"judge.roles names {min(unknown)!r}, which is no role: agent_roles has {known}")
        return self

    @model_validator(mode="after")
    def _launches_its_engine(self) -> Self:
        launch = self.engine.launch
        if launch is not None and (self.gateway.engines or "upstream" in self.gateway.model_fields_set):
            raise ValueError("engine.launch starts the engine that gateway names: remove gateway.engines and upstream")
        if launch is not None and launch.sleep and self.train is not None and self.train.asynchronous:
            raise ValueError("engine.launch.sleep stops the rollouts that train.asynchronous runs beside an update")
        return self

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a YAML file. Raises ConfigError naming the file and every wrong key or value."""
        data = read_yaml(path)
        if not isinstance(data, dict):
            raise ConfigError(f"{path} holds {type(data).__name__}, expected a mapping of sections")
        return cls.parse(data, source=str(path))

    @classmethod
    def parse(cls, data: dict[str, Any], source: str = "configuration") -> Self:
        """Check `data`. Raises ConfigError naming `source` and every wrong key or value."""
        try:
            return cls.model_validate(expand_variables(data, source))
        except ValidationError as error:
            raise ConfigError("\n".join(f"{source}: {_format_error(item)}" for item in error.errors())) from error

    def require_train(self) -> TrainConfig:
        """The `train` section. Raises ConfigError if there is none."""
        if self.train is None:
            raise ConfigError("the configuration has no section `train`; set train.model and train.agent")
        return self.train

    def require_roles(self) -> dict[str, RoleConfig]:
        """The roles to train. Raises ConfigError if there are none."""
        if not self.agent_roles.roles:
            raise ConfigError("agent_roles names no role to train; add e.g. `agent_roles: {writer: {lora_r: 16}}`")
        return self.agent_roles.roles

    def to_yaml(self) -> str:
        """The tree with all defaults, as YAML that `load` accepts; without the secrets, which connect to nothing."""
        data = self.model_dump(mode="json", exclude_none=True)
        data["agent_roles"].update(data["agent_roles"].pop("roles"))
        return yaml.safe_dump(data, sort_keys=False)


def _format_error(item: Any) -> str:
    """One pydantic error as a message that begins with the path of the key."""
    path = ".".join(str(part) for part in item["loc"])
    if item["type"] != "extra_forbidden":
        return f"{path}: {item['msg']}{_got(item['input'])}"
    known = _known_keys(item["loc"])
    close = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
    return f"{path}: unknown key; {hint}"


def _got(value: Any) -> str:
    """A wrong value, for an error; without what may be a secret, so no section and no list."""
    if isinstance(value, dict | list):
        return ""
    if isinstance(value, str) and ("@" in value or "://" in value):
        value = SecretUrl.shown(value)
    return f" (got {value!r})"


def _known_keys(loc: tuple[str | int, ...]) -> list[str]:
    """Keys of the section that the key at `loc` is in."""
    parts = [part for part in loc[:-1] if isinstance(part, str)]
    if not parts:
        return sorted(Config.model_fields)
    section = _SECTIONS.get(".".join(parts)) or _SECTIONS.get(parts[-1], RoleConfig)
    return sorted(section.model_fields)


_SECTIONS: dict[str, type[BaseModel]] = {
    "agent_roles": AgentRoles,
    "server": ServerConfig,
    "collector": CollectorConfig,
    "tls": TlsConfig,
    "queue": QueueConfig,
    "gateway": GatewayConfig,
    "timeouts": TimeoutsConfig,
    "engines": UpstreamConfig,
    "sampling": TrafficSamplingConfig,
    "train.sampling": SamplingConfig,
    "engine": EngineConfig,
    "launch": LaunchConfig,
    "train": TrainConfig,
    "ray": RayConfig,
    "runners": RayRunnersConfig,
    "trainer": RayTrainerConfig,
    "sft": SftConfig,
    "traces": SftTracesConfig,
    "judge": JudgeConfig,
    "canary": CanaryConfig,
    "promote": PromoteConfig,
    "guard": GuardConfig,
}
