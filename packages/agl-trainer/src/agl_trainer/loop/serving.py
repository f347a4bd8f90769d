"""The in-process engines for `agl serve`: each base model with the adapters that a run published last."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from agl.config import Config
from agl.errors import ConfigError
from agl.runner.run_id import run_of
from agl.server_thread import EngineApp
from agl.store import Store
from agl_trainer.loop.output_folder import adapter_name
from agl_trainer.model.adapter_files import WEIGHTS
from agl_trainer.model.model_folder import find_model

if TYPE_CHECKING:
    from agl_trainer.model.policy import Policy

log = logging.getLogger(__name__)


@contextmanager
def local_engine(config: Config, store: Store) -> Iterator[list[EngineApp]]:
    """The apps for the run in `train.output_dir`; roles without a published adapter answer as their base model.

    Raises ConfigError if a file is missing.
    """
    train = config.require_train()
    bases = config.bases()
    for base in bases:
        find_model(base.path, base.key, downloads=True)
    run = run_of(Path(train.output_dir))
    # Imported after that check, because it loads torch.
    from agl_trainer.loop.engines import open_engine

    with ExitStack() as stack:
        apps = []
        for base in bases:
            policy, _, app = stack.enter_context(open_engine(config, base))
            for role in policy.roles:
                _load_published(policy, role, run, store)
            apps.append(EngineApp(app, base.served))
        yield apps


def _load_published(policy: "Policy", role: str, run: str, store: Store) -> None:
    from safetensors.torch import load_file

    resource = store.get_resource(adapter_name(run, role))
    if resource is None:
        log.warning(
            "role %r has no adapter of run %r (train.output_dir) in %s yet: it answers as the base model",
            role,
            run,
            store.uri,
        )
        return
    weights = Path(resource.uri) / WEIGHTS
    if not weights.exists():
        raise ConfigError(
            f"{role}@{resource.version} of run {run!r} in {store.uri} should be in {weights}: no such file; train again"
        )
    policy.load_adapter(role, load_file(weights), resource.version)
