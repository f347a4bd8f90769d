"""The in-process engine for `agl serve`: the base model with the latest published adapter of each role."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import load_file
from starlette.types import ASGIApp

from agl.config import Config
from agl.errors import ConfigError
from agl.store import Store
from agl_trainer.loop.engines import open_engine
from agl_trainer.model.adapter_files import WEIGHTS

log = logging.getLogger(__name__)


@contextmanager
def local_engine(config: Config, store: Store) -> Iterator[ASGIApp]:
    """The app; roles without a published adapter answer as the base model. Raises ConfigError if a file is missing."""
    with open_engine(config) as (policy, _, app):
        for role in policy.roles:
            resource = store.get_resource(role)
            if resource is None:
                log.warning("role %r has no adapter in %s yet: it answers as the base model", role, store.uri)
                continue
            weights = Path(resource.uri) / WEIGHTS
            if not weights.exists():
                raise ConfigError(
                    f"{role}@{resource.version} of {store.uri} should be in {weights}: no such file; train again"
                )
            policy.load_adapter(role, load_file(weights), resource.version)
        yield app
