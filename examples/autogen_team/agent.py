"""An AutoGen team that answers questions about stock: `planner` names the article, `executor` looks it up.

It contains nothing about training: its models are the ones that OPENAI_BASE_URL serves as `planner` and `executor`.
"""

import asyncio
import os
from functools import lru_cache
from typing import Any

from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.base import TaskResult
from autogen_agentchat.conditions import MaxMessageTermination
from autogen_agentchat.messages import BaseChatMessage, ToolCallSummaryMessage
from autogen_agentchat.teams import RoundRobinGroupChat
from autogen_core.models import ModelInfo
from autogen_ext.models.openai import OpenAIChatCompletionClient

from examples.autogen_team.inventory import STOCK

PLANNER_SYSTEM = "Name the article as item-colour."
EXECUTOR_SYSTEM = "Look the article up."
PLANNER_TOKENS, EXECUTOR_TOKENS = 12, 48
"""Limits of the answers in tokens, so that a model that does not stop ends soon."""

_UNKNOWN_MODEL: ModelInfo = {
    "vision": False,
    "function_calling": True,
    "json_output": False,
    "family": "unknown",
    "structured_output": False,
}


async def run(task: dict[str, Any]) -> dict[str, Any]:
    """Answer `task["question"]`; returns `{"plan": str, "called": bool, "answer": str}`.

    `called`: whether `answer` is the tool's result. Otherwise `answer` is the tool's error message or, if the executor
    called no tool, its text.
    """
    return _answer(await _team().run(task=task["question"]))


def _team() -> RoundRobinGroupChat:
    """A new team, because agents keep their history. It stops after three messages: question, plan, answer."""
    base_url, loop = os.environ["OPENAI_BASE_URL"], asyncio.get_running_loop()
    planner = AssistantAgent(
        "planner", _client("planner", PLANNER_TOKENS, base_url, loop), system_message=PLANNER_SYSTEM
    )
    executor = AssistantAgent(
        "executor",
        _client("executor", EXECUTOR_TOKENS, base_url, loop),
        tools=[STOCK],
        system_message=EXECUTOR_SYSTEM,
    )
    return RoundRobinGroupChat([planner, executor], termination_condition=MaxMessageTermination(3))


@lru_cache(maxsize=8)
def _client(model: str, max_tokens: int, base_url: str, loop: asyncio.AbstractEventLoop) -> OpenAIChatCompletionClient:
    """A model client for one event loop, because its connections belong to the loop that opened them."""
    return OpenAIChatCompletionClient(model=model, base_url=base_url, max_tokens=max_tokens, model_info=_UNKNOWN_MODEL)


def _answer(result: TaskResult) -> dict[str, Any]:
    _, plan, last = (message for message in result.messages if isinstance(message, BaseChatMessage))
    called = isinstance(last, ToolCallSummaryMessage) and not any(one.is_error for one in last.results)
    return {"plan": plan.to_text().strip(), "called": called, "answer": last.to_text().strip()}
