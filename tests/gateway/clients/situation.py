"""What every client goes through: functions named after their situation, each with a rollout of its own in its URL."""

import asyncio
import inspect
import json
import sys
from collections.abc import Callable
from typing import Any

MODEL = "writer@3"
MANY = 100
SETTINGS: dict[str, Any] = {"stop": ["END"], "seed": 7, "temperature": 0.5}
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "search",
        "description": "Finds things.",
        "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}},
    },
}


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def run(*situations: Callable[[str], Any]) -> None:
    """Write what each gave, by its name; the gateway's URL is the first argument."""
    sys.stdout.write(json.dumps({situation.__name__: _run(situation) for situation in situations}))


def _run(situation: Callable[[str], Any]) -> Any:
    given = situation(f"{sys.argv[1]}/rollout/{situation.__name__}/attempt/a1/v1")
    return asyncio.run(given) if inspect.iscoroutine(given) else given
