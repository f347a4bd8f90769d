"""The in-process engine for `agl serve`: the base model with the newest adapters that a training published."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import load_file
from starlette.types import ASGIApp

from agl.config import Config
from agl.errors import ConfigError
from agl.store import Store
from agl_trainer.loop.session import open_engine
from agl_trainer.model.adapter_files import WEIGHTS

log = logging.getLogger(__name__)


@contextmanager
def local_engine(config: Config, store: Store) -> Iterator[ASGIApp]:
    """The engine's app. A role without a published adapter answers as the base model does.

    Raises ConfigError where the store names an adapter that is not there any more.
    """
    with open_engine(config) as (policy, _, app):
        for role in policy.roles:
            resource = store.get_resource(role)
            if resource is None:
                log.warning("role %r has no adapter in %s yet: it answers as the base model", role, store.uri)
                continue
            weights = Path(resource.uri) / WEIGHTS
            if not weights.exists():
                raise ConfigError(f"{store.uri} says that {role}@{resource.version} lies in {weights}: it is not there")
            policy.load_adapter(role, load_file(weights), resource.version)
        yield app
