"""The reward of an answer in three dimensions, each 0 or 1: plan, call, goal."""

from collections.abc import Mapping
from typing import Any


def score(task: Mapping[str, Any], answer: Mapping[str, Any]) -> dict[str, float]:
    """plan: the planner named the right article. call: the tool returned a number. goal: the number is right."""
    return {
        "plan": float(answer["plan"] == task["article"]),
        "call": float(answer["called"]),
        "goal": float(answer["called"] and answer["answer"] == str(task["pieces"])),
    }
