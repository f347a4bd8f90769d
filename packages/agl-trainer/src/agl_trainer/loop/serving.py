"""The in-process engine for `agl serve`: the base model with the adapters that a run published last."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from starlette.types import ASGIApp

from agl.config import Config
from agl.errors import ConfigError
from agl.runner.run_id import run_of
from agl.store import Store
from agl_trainer.loop.output_folder import adapter_name
from agl_trainer.model.adapter_files import WEIGHTS
from agl_trainer.model.model_folder import find_model

log = logging.getLogger(__name__)


@contextmanager
def local_engine(config: Config, store: Store) -> Iterator[ASGIApp]:
    """The app for the run in `train.output_dir`; roles without a published adapter answer as the base model.

    Raises ConfigError if a file is missing.
    """
    train = config.require_train()
    find_model(train.model, downloads=True)
    run = run_of(Path(train.output_dir))
    # Imported after that check, because they load torch.
    from safetensors.torch import load_file

    from agl_trainer.loop.engines import open_engine

    with open_engine(config) as (policy, _, app):
        for role in policy.roles:
            resource = store.get_resource(adapter_name(run, role))
            if resource is None:
                log.warning(
                    "role %r has no adapter of run %r (train.output_dir) in %s yet: it answers as the base model",
                    role,
                    run,
                    store.uri,
                )
                continue
            weights = Path(resource.uri) / WEIGHTS
            if not weights.exists():
                raise ConfigError(
                    f"{role}@{resource.version} of run {run!r} in {store.uri} should be in {weights}: no such file; "
                    "train again"
                )
            policy.load_adapter(role, load_file(weights), resource.version)
        yield app
