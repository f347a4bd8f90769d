"""The team on Microsoft Agent Framework, which makes OpenTelemetry spans itself."""

import asyncio

from agent_framework import Agent
from agent_framework.observability import enable_instrumentation
from agent_framework.openai import OpenAIChatCompletionClient
from exporting import QUESTION, STREAMING, exporting, rewarded


def count_stock(item: str) -> str:
    """Count an item in stock."""
    return "7"


async def ask(agent: Agent, question: str) -> str:
    if not STREAMING:
        return (await agent.run(question)).text
    return (await agent.run(question, stream=True).get_final_response()).text


async def run() -> None:
    client = OpenAIChatCompletionClient(model="team@3")
    planner = Agent(client, name="planner", instructions="You plan.")
    executor = Agent(client, name="executor", instructions="You do.", tools=[count_stock])
    await ask(executor, await ask(planner, QUESTION))


with exporting():
    enable_instrumentation()
    with rewarded():
        asyncio.run(run())
