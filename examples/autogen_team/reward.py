"""The reward of an answer, in three parts that are each 0 or 1: plan, call, goal."""

from collections.abc import Mapping
from typing import Any


def score(task: Mapping[str, Any], answer: Mapping[str, Any]) -> dict[str, float]:
    """plan: the planner named the article. call: the tool gave a number. goal: it is the right one."""
    return {
        "plan": float(answer["plan"] == task["article"]),
        "call": float(answer["called"]),
        "goal": float(answer["called"] and answer["answer"] == str(task["pieces"])),
    }
