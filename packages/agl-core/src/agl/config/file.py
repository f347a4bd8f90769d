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
from agl.config.models import Base, ModelConfig
from agl.config.queue import QueueConfig
from agl.config.ray import RayConfig, RayRunnersConfig, RayTrainerConfig
from agl.config.roles import AgentRoles, RoleConfig
from agl.config.sampling import TrafficSamplingConfig
from agl.config.section import Name, Section
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
    models: dict[Name, ModelConfig] = Field(default_factory=dict)
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
    def _names_its_models_once(self) -> Self:
        if self.train is not None and self.train.model is None and not self.models:
            raise ValueError("train.model names no base model: set it, or name several in `models`")
        if not self.models:
            if named := next((name for name, role in self.agent_roles.roles.items() if role.model), None):
                raise ValueError(f"agent_roles.{named}.model names a model of the section `models`, and there is none")
            return self
        for key in ("model", "chat_template"):
            if self.train is not None and getattr(self.train, key) is not None:
                name = "path" if key == "model" else key
                raise ValueError(f"train.{key} and `models` exclude each other: set models.<name>.{name}, or remove it")
        return self

    @model_validator(mode="after")
    def _places_its_roles(self) -> Self:
        if not self.models:
            return self
        roles, known = self.agent_roles.roles, ", ".join(self.models)
        for name, role in roles.items():
            found = self._model_of(name)
            if (role.model or found) not in self.models:
                got = f"names {role.model!r}" if role.model else "is not set"
                raise ValueError(f"agent_roles.{name}.model {got}: expected one of the models {known}")
            if role.model not in (None, found):
                raise ValueError(
                    f"agent_roles.{name} shares the adapter of {role.adapter}, which is on the model {found!r}, not on "
                    f"{role.model!r}: an adapter has one base model"
                )
        for name in self.models:
            if "." in name:  # It is part of keys and of names of files.
                raise ValueError(f"models.{name}: expected a name without dots")
            if name in roles:
                raise ValueError(f"models and agent_roles both have {name!r}, and clients name both alike: rename one")
            if all(self._model_of(role) != name for role in roles):
                raise ValueError(f"models.{name}: no role has its adapter on it; remove it, or set agent_roles.*.model")
        return self

    @model_validator(mode="after")
    def _launches_its_engines(self) -> Self:
        taken: dict[int, str] = {}
        for base in self.bases():
            launch, key = base.engine.launch, f"{base.engine_key}.launch"
            has_servers = bool(self.servers_of(base)) or self.gateway.upstream != SecretUrl("local")
            if base.engine.kind == "remote" and has_servers:
                raise ValueError(f"{base.engine_key}: remote engines register; remove gateway.engines and upstream")
            if launch is None:
                continue
            if has_servers:
                raise ValueError(f"{key} starts the engine that gateway names: remove gateway.engines and upstream")
            if launch.sleep and self.train is not None and self.train.asynchronous:
                raise ValueError(f"{key}.sleep stops the rollouts that train.asynchronous runs beside an update")
            if launch.port and taken.setdefault(launch.port, key) != key:
                raise ValueError(f"{taken[launch.port]} and {key} both start a server at port {launch.port}")
        return self

    @model_validator(mode="after")
    def _tells_its_servers_apart(self) -> Self:
        """Which base model a server of `gateway` has, if there are several."""
        if not self.models or self.train is None:
            return self
        if self.gateway.upstream != SecretUrl("local"):
            raise ValueError("gateway.upstream serves one base model: list the servers of `models` in gateway.engines")
        for engine in self.gateway.engines:
            bases = [name for name in engine.models or self.models if name in self.models]
            if len(bases) > 1:
                raise ValueError(
                    f"gateway.engines: {engine.url} serves {' and '.join(bases)}, and a server has one base model: "
                    "name one of them in its `models`"
                )
        return self

    def _model_of(self, role: str) -> str | None:
        """The model of `models` that the adapter of `role` is on; None if it names none of several."""
        only = next(iter(self.models)) if len(self.models) == 1 else None
        return self.agent_roles.owner_of(role).model or only

    def bases(self) -> list[Base]:
        """The base models: those of `models`, or `train.model` alone; none without a section `train`."""
        roles = self.agent_roles.roles
        if not self.models:
            only = self.train.model if self.train else None
            return [Base.only(self.train, only, self.engine, roles)] if self.train and only else []
        return [
            Base(
                name,
                model.path,
                model.chat_template,
                model.engine or self.engine,
                {role: config for role, config in roles.items() if self._model_of(role) == name},
                model.device,
                is_one_of=True,
            )
            for name, model in self.models.items()
        ]

    def base_of(self, role: str) -> Base:
        """The base model of the adapter of `role`. Raises ConfigError if there are several, and none has the role."""
        found = next((base for base in self.bases() if role in base.roles or not base.is_one_of), None)
        if found is None:
            raise ConfigError(f"agent_roles has no role {role!r}, so it is not known on which of `models` it is")
        return found

    def servers_of(self, base: Base) -> list[UpstreamConfig]:
        """The servers of `base` that `gateway.engines` lists."""
        return [one for one in self.routed_engines() if not base.is_one_of or base.name in one.models]

    def routed_engines(self) -> list[UpstreamConfig]:
        """`gateway.engines`, in which a server of a model of `models` also serves the roles on it."""
        added = {base.name: base.roles for base in self.bases() if base.is_one_of}
        return [
            engine.model_copy(
                update={"models": [*engine.models, *(role for name in engine.models for role in added.get(name, ()))]}
            )
            for engine in self.gateway.engines
        ]

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
        for name, role in self.agent_roles.roles.items():
            if role.adapter:  # It takes what has defaults from the other role.
                data["agent_roles"][name] = role.model_dump(mode="json", exclude_unset=True)
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
    if len(parts) == 2 and parts[0] in _NAMED:
        return sorted(_NAMED[parts[0]].model_fields)
    section = _SECTIONS.get(".".join(parts)) or _SECTIONS[parts[-1]]
    return sorted(section.model_fields)


_NAMED: dict[str, type[BaseModel]] = {"agent_roles": RoleConfig, "models": ModelConfig}
"""Sections that hold sections of any name."""


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
