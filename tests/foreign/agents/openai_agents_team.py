"""The team on the OpenAI Agents SDK, instrumented by the package that the first argument names.

None of them records the response id of chat completions. So OpenTelemetry's instrumentation of the HTTP client is
enabled as well, which sends `traceparent`.
"""

import asyncio
import sys
from importlib import import_module

from agents import Agent, Runner, function_tool, set_default_openai_api, set_trace_processors
from exporting import QUESTION, STREAMING, exporting, rewarded
from opentelemetry.instrumentation.httpx import HTTPX2ClientInstrumentor


@function_tool
def count_stock(item: str) -> str:
    """Count an item in stock."""
    return "7"


async def ask(agent: Agent, question: str) -> str:
    if not STREAMING:
        return (await Runner.run(agent, question)).final_output
    answer = Runner.run_streamed(agent, question)
    async for _ in answer.stream_events():
        pass
    return answer.final_output


async def run() -> None:
    await ask(executor, await ask(planner, QUESTION))


set_default_openai_api("chat_completions")
set_trace_processors([])  # the SDK's own exporter sends to OpenAI
planner = Agent(name="planner", instructions="You plan.", model="team@3")
executor = Agent(name="executor", instructions="You do.", model="team@3", tools=[count_stock])

with exporting():
    import_module(f"{sys.argv[1]}.instrumentation.openai_agents").OpenAIAgentsInstrumentor().instrument()
    HTTPX2ClientInstrumentor().instrument()
    with rewarded():
        asyncio.run(run())
