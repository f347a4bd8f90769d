"""One engine behind the gateway: where it is, what it serves, who is there, and whether it answers."""

import os
from collections.abc import Mapping
from typing import Final

from agl.config import UpstreamConfig
from agl.errors import ConfigError
from agl.gateway.engine_kind import SHAPES
from agl.gateway.fair_queue import Slots

_CREDENTIALS: Final = frozenset({"authorization", "x-api-key", "api-key", "cookie"})


class Engine:
    """The server at `config.url`. Raises ConfigError where its key is not in the environment."""

    def __init__(self, config: UpstreamConfig) -> None:
        self.url = config.url.rstrip("/")
        self.shape = SHAPES[config.kind]
        self.slots = Slots(config.max_concurrent)
        self.answers = True
        """False from a failure to talk to it until it lists its models again."""
        self._models = frozenset(config.models)
        self._key = read_key(config)

    def serves(self, model: str) -> bool:
        """Whether `model`, any version of it, is among those it is configured to serve; without such a list all are."""
        return not self._models or model in self._models or model.partition("@")[0] in self._models

    def headers(self, given: Mapping[str, str]) -> dict[str, str]:
        """`given` with the engine's own key, if it has one, in place of what the client showed."""
        if self._key is None:
            return dict(given)
        kept = {name: value for name, value in given.items() if name.lower() not in _CREDENTIALS}
        return kept | {"authorization": f"Bearer {self._key}"}


def read_key(config: UpstreamConfig) -> str | None:
    """The engine's key. Raises ConfigError where the environment variable that holds it is not set."""
    if config.key_env is None:
        return None
    key = os.environ.get(config.key_env, "").strip()
    if not key:
        raise ConfigError(f"gateway.engines: ${config.key_env}, the key of {config.url}, is not set")
    return key
