"""The team on Pydantic AI, which makes OpenTelemetry spans itself."""

import asyncio

from exporting import QUESTION, STREAMING, exporting, rewarded
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel


async def ask(agent: Agent, question: str) -> str:
    if not STREAMING:
        return (await agent.run(question)).output
    async with agent.run_stream(question) as answer:
        return await answer.get_output()


async def run(planner: Agent, executor: Agent) -> None:
    await ask(executor, await ask(planner, QUESTION))


with exporting():
    Agent.instrument_all()
    planner = Agent(OpenAIChatModel("team@3"), name="planner", system_prompt="You plan.")
    executor = Agent(OpenAIChatModel("team@3"), name="executor", system_prompt="You do.")

    @executor.tool_plain
    def count_stock(item: str) -> str:
        """Count an item in stock."""
        return "7"

    with rewarded():
        asyncio.run(run(planner, executor))
