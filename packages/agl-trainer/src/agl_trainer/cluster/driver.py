"""`agl train --on ray`: hands a training to the supervisor on a Ray cluster, and waits for its end."""

import logging
import os
import secrets
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from agl.cli.interrupt import INTERRUPTED, stops_in_order
from agl.config import Config
from agl.config.collector import TOKEN_VARIABLE
from agl.config.source import read_yaml
from agl.errors import ConfigError, TrainingError
from agl_trainer.cluster.plan import Plan

logger = logging.getLogger(__name__)

_POLL_S: Final = 1.0
_OBJECT_STORE_BYTES: Final = 100 * 2**20
"""Of a Ray that is started here. No rollout passes through it."""


def train_on_ray(path: Path, *, address: str | None, options: tuple[str, ...]) -> int:
    """Train as the configuration at `path` says, on the cluster at `address` or on one of this machine alone.

    Returns the exit code of the training. If the cluster already trains this run, waits for that. Raises ConfigError.
    """
    config, data = Config.load(path), read_yaml(path)
    train = config.require_train()
    address = address or os.environ.get("RAY_ADDRESS")
    token = "" if address is None else os.environ.get(TOKEN_VARIABLE) or secrets.token_hex(16)
    name = Path(train.output_dir).name
    folder = str(Path.cwd())
    plan = Plan(name, data, config.ray, train.output_dir, train.concurrency, folder, token, options)
    plan.check()
    ray = _connected(address)
    try:
        plan.check_room(ray.cluster_resources())
        return _wait_for(ray, plan)
    finally:
        ray.shutdown()


def _connected(address: str | None) -> Any:
    """The module `ray`, connected. Raises ConfigError if it is not installed, or no cluster answers."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # A training reports to nobody unless it is asked to.
    try:
        import ray
    except ImportError as error:
        raise ConfigError(f"Ray is not installed ({error}): pip install 'agl-trainer[ray]'") from error
    from agl_trainer.cluster.supervisor import NAMESPACE

    own = {"include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES} if address is None else {}
    try:
        ray.init(address or "local", namespace=NAMESPACE, logging_level=logging.WARNING, **own)
    except ConnectionError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"no Ray cluster at {address} ({reason}): start one with `ray start --head`, or leave out --address"
        ) from error
    return ray


def _wait_for(ray: Any, plan: Plan) -> int:
    from ray.exceptions import RayError

    from agl_trainer.cluster.supervisor import NAMESPACE, Supervisor

    made = ray.remote(Supervisor).options(
        name=plan.name,
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        max_restarts=-1,
        max_task_retries=-1,
    )
    try:
        with suppress(ValueError):  # There is none of this name.
            ray.get_actor(plan.name)
            logger.warning("the cluster already trains %s: waiting for its end; `ray logs` shows its lines", plan.name)
        supervisor = made.remote(plan)
        _check_same(ray.get(supervisor.plan.remote()), plan)
        with stops_in_order("stopping; the same command resumes at the last checkpoint"):
            try:
                outcome = _outcome(ray, supervisor)
            except KeyboardInterrupt:
                ray.get(supervisor.stop.remote())
                with suppress(KeyboardInterrupt):
                    _outcome(ray, supervisor)
                ray.kill(supervisor)
                return INTERRUPTED
        ray.kill(supervisor)
    except RayError as error:
        raise TrainingError(f"the Ray cluster failed: {error}") from error
    if outcome.code:
        raise _Ended(outcome.message, outcome.code)
    return 0


def _check_same(running: Plan, wanted: Plan) -> None:
    if (running.config, running.ray, running.options) != (wanted.config, wanted.ray, wanted.options):
        raise ConfigError(
            f"the Ray cluster already trains {wanted.name} with another configuration: end that with Ctrl-C in the "
            "command that waits for it, or choose another train.output_dir"
        )


def _outcome(ray: Any, supervisor: Any) -> Any:
    while (outcome := ray.get(supervisor.outcome.remote())) is None:
        time.sleep(_POLL_S)
    return outcome


class _Ended(TrainingError):
    """A training on the cluster ended with an exit code other than 0."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(f"the training ended with exit code {code}: {message}")
        self.exit_code = code
