"""Models with scripted responses, and agents that use them."""

import json
from typing import Any

from autogen_agentchat.agents import AssistantAgent
from autogen_core import FunctionCall
from autogen_core.models import CreateResult, RequestUsage
from autogen_ext.models.replay import ReplayChatCompletionClient

from tests.autogen.conftest import MODEL_INFO

USAGE = RequestUsage(prompt_tokens=11, completion_tokens=3)


def says(*answers: str | CreateResult) -> ReplayChatCompletionClient:
    """A model that returns these responses in order."""
    return ReplayChatCompletionClient(list(answers), model_info=MODEL_INFO)


def calls(*names: str, **arguments: Any) -> CreateResult:
    """A response that calls each of these tools with the same arguments; call ids are c0, c1, ..."""
    content = [FunctionCall(f"c{index}", json.dumps(arguments), name) for index, name in enumerate(names)]
    return CreateResult(finish_reason="function_calls", content=content, usage=USAGE, cached=False)


def agent(name: str, *answers: str | CreateResult, **options: Any) -> AssistantAgent:
    return AssistantAgent(name, says(*answers), description=f"the {name}", **options)
