"""How a store records an evaluation: a resource that names the rollout of each task."""

import time
from collections.abc import Mapping
from typing import Final

from agl.store import Resource

EVALUATION: Final = "eval "


def evaluation_prefix(run: str) -> str:
    """Beginning of the names of the resources of a run's evaluations; the label follows."""
    return f"{EVALUATION}{run}/"


def evaluation_record(run: str, label: str, folder: str, rollouts: Mapping[str, str]) -> Resource:
    """The record of an evaluation that ran `rollouts`, by task. One of the same label replaces it."""
    metadata = {"rollouts": dict(rollouts), "made_ns": time.time_ns()}
    return Resource(evaluation_prefix(run) + label, 0, folder, metadata)
