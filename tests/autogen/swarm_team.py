"""A Swarm of three with hand-offs and tools, recorded for the golden tree: `python -m tests.autogen.swarm_team`."""

import asyncio
from pathlib import Path
from typing import Any

from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.conditions import TextMentionTermination
from autogen_agentchat.teams import Swarm
from autogen_ext.models.openai import OpenAIChatCompletionClient
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import agl
from agl.context import RolloutProcessor
from agl_autogen import AutoGenInstrumentor
from tests import golden
from tests.autogen.conftest import MODEL_INFO
from tests.vllm_server import running_server

GOLDEN = Path(__file__).parent / "golden" / "swarm.json"


async def stock(item: str) -> str:
    """Number of items in stock."""
    return f"7 x {item}"


async def recorded(memory: InMemorySpanExporter) -> list[dict[str, Any]]:
    """The tree of one run in a rollout; `memory` is the exporter of the global provider."""
    AutoGenInstrumentor().instrument(capture_token_ids=True)
    try:
        async with running_server() as server:
            options = {"base_url": server.base_url, "api_key": "none", "model_info": MODEL_INFO, "temperature": 0.5}
            clients = [OpenAIChatCompletionClient(model=name, **options) for name in ("planner", "finder", "executor")]
            team = swarm(*clients)
            memory.clear()  # create_agent spans precede the run
            with agl.rollout("r1", group_id="g1"):
                await team.run(task="How many mugs?")
            for client in clients:
                await client.close()
        return golden.described(memory.get_finished_spans())
    finally:
        AutoGenInstrumentor().uninstrument()


def swarm(planner: Any, finder: Any, executor: Any) -> Swarm:
    """The planner hands off to the finder, and the finder to the executor, which calls a tool and streams."""
    return Swarm(
        [
            AssistantAgent("planner", planner, handoffs=["finder"]),
            AssistantAgent("finder", finder, handoffs=["executor"]),
            AssistantAgent("executor", executor, tools=[stock], reflect_on_tool_use=True, model_client_stream=True),
        ],
        termination_condition=TextMentionTermination("TERMINATE"),
    )


def write() -> None:
    provider, memory = TracerProvider(), InMemorySpanExporter()
    provider.add_span_processor(RolloutProcessor())
    provider.add_span_processor(SimpleSpanProcessor(memory))
    trace.set_tracer_provider(provider)
    GOLDEN.parent.mkdir(exist_ok=True)
    golden.write(GOLDEN, asyncio.run(recorded(memory)))


if __name__ == "__main__":
    write()
