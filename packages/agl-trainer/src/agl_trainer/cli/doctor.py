"""Checks of what `train`, `sft` and `judge` name: by `agl doctor`, and by each command before it loads torch."""

import importlib.util
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Final

import urllib3

from agl.cli.doctor import Check, check_engines, check_folder, check_store, demand
from agl.cli.terminal import counted
from agl.config import Base, Config, JudgeConfig, TrainConfig
from agl.errors import AglError, ConfigError
from agl.runner.command import Addresses, Command
from agl.runner.import_function import load_function
from agl.runner.instrumentors import load_instrumentor
from agl_trainer.engine.vllm.launch import vllm_program
from agl_trainer.model.base_model import check_4bit
from agl_trainer.model.model_folder import find_model
from agl_trainer.rollout.task_list import load_list

_TIMEOUT_S = 5.0

_ALWAYS = ("agent_roles", "train.model", "train.report_to", "train.output_dir", "store")
_ROLLOUTS = ("train.agent", "train.command", "train.reward", "train.instrument", "engine", "engine.launch")
NEEDS: Final = {
    "train": (*_ALWAYS, *_ROLLOUTS, "train.tasks", "train.eval_tasks", "judge"),
    "train --from-store": (*_ALWAYS, "judge"),
    "sft": (*_ALWAYS, "sft.examples"),
    "adapters": ("train.model",),
    "eval": (*_ALWAYS, *_ROLLOUTS, "train.eval_tasks"),
}
"""What each command checks."""
_REQUIRED: Final = {"train": "tasks", "eval": "eval_tasks"}
"""Key of `train` that a command needs, besides that of the agent."""


def check_model(config: Config) -> Iterator[Check]:
    """The checks of `agl doctor`, which looks at store and engines itself; none without a section `train`."""
    if config.train is not None:
        keys = {key for keys in NEEDS.values() for key in keys} - {"store", "engine"}
        yield from _checks(config, config.train, keys, downloads=False)


def demand_for(command: str, config: Config) -> None:
    """Check what `command` uses. Raises CommandError with a line for each problem, ConfigError for a missing key."""
    train = config.require_train()
    if command in _REQUIRED:
        for key in ("command" if train.command else "agent", _REQUIRED[command]):
            if getattr(train, key) is None:
                raise ConfigError(f"train.{key} is not set; name a function as module:function")
    if command == "sft" and config.sft is None:
        raise ConfigError("the configuration has no `sft` section; `agl sft` needs sft.examples or sft.traces")
    demand(_checks(config, train, NEEDS[command], downloads=True))


def _checks(config: Config, train: TrainConfig, keys: Collection[str], *, downloads: bool) -> Iterator[Check]:
    bases = config.bases()
    known = {*keys, *(base.key for base in bases if "train.model" in keys)}
    named: list[tuple[str, object, Callable[[], object]]] = [
        ("agent_roles", ", ".join(config.agent_roles.roles), config.require_roles),
        *((base.key, base.path, partial(_find_model, train, base, downloads=downloads)) for base in bases),
        ("train.agent", train.agent, partial(load_function, train.agent, "train.agent")),
        ("train.command", train.command, partial(Command.parse, train.command or "", Addresses("", ""))),
        ("train.reward", train.reward, partial(load_function, train.reward, "train.reward")),
        ("train.instrument", train.instrument, partial(_load_instrumentors, train.instrument)),
        ("train.report_to", train.report_to, partial(_find_trackers, train.report_to)),
    ]
    examples = config.sft.examples if config.sft else None
    lists = {"train.tasks": train.tasks, "train.eval_tasks": train.eval_tasks, "sft.examples": examples}
    named += [(key, reference, partial(_count, reference, key)) for key, reference in lists.items()]
    if config.judge is not None:
        named.append(("judge", config.judge.url, partial(_ask_judge, config.judge)))
    for key, value, find in named:
        if key in known and (value or key == "agent_roles"):
            yield _check(key, ", ".join(value) if isinstance(value, list) else str(value), find)
    if "train.output_dir" in keys:
        yield check_folder("train.output_dir", Path(train.output_dir), "choose another train.output_dir")
    if "store" in keys:
        yield check_store(config.store_uri)
    for base in bases if "engine.launch" in keys else ():
        if (launch := base.engine.launch) is not None and base.engine.kind == "vllm":
            yield _check(f"{base.engine_key}.launch", launch.program, partial(vllm_program, launch))
    if "engine" in keys and any(base.engine.kind == "vllm" for base in bases):
        yield from check_engines(config)


def _check(key: str, value: str, find: Callable[[], object]) -> Check:
    try:
        found = find()
    except AglError as error:
        return Check(key, value or "none", str(error).removeprefix(f"{key}: ").removeprefix(f"{value}: "))
    return Check(key, f"{value}: {found}" if isinstance(found, str) else value)


def _find_model(train: TrainConfig, base: Base, *, downloads: bool) -> str:
    if train.load_in_4bit:
        check_4bit()
    return find_model(base.path, base.key, downloads=downloads)


def _load_instrumentors(names: Sequence[str]) -> None:
    for name in names:
        load_instrumentor(name)


def _find_trackers(names: Sequence[str]) -> None:
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"{name} is not installed: pip install {name}")


def _count(reference: str | None, key: str) -> str:
    return counted(len(load_list(reference, key)), "item")


def _ask_judge(judge: JudgeConfig) -> str:
    """The model, if the judge's server answers. Whether it lists its models does not matter."""
    url = f"{judge.base_url}/models"
    try:
        response = urllib3.request("GET", url, headers=judge.authorization(), timeout=_TIMEOUT_S, retries=False)
    except urllib3.exceptions.HTTPError as error:
        raise ConfigError(f"it does not answer: {error}; start it, or change judge.url") from error
    if response.status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        raise ConfigError(
            f"{url} answers {response.status}: set judge.key_env to a variable with a key that it accepts"
        )
    return judge.model
