"""The measured agents: one per framework, deterministic and without network, each run in several ways."""

import asyncio
import json
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from benchmarks.lookup_task import FACT, PROMPT, QUESTION, TOOL_CALLS


@dataclass(frozen=True, slots=True)
class Workload:
    """`run` runs `agents` agents to completion."""

    name: str
    agents: int
    run: Callable[[], Any]


def workloads(framework: str, callbacks: list[Any]) -> list[Workload]:
    """Every way to run the agent of `framework`. Each LangChain run gets `callbacks`; AutoGen has none."""
    loop = asyncio.new_event_loop()
    return _langchain(loop, {"callbacks": callbacks}) if framework == "langchain" else _autogen(loop)


def _langchain(loop: asyncio.AbstractEventLoop, config: Any) -> list[Workload]:
    """`create_agent`: five model calls, four tool calls."""
    # Here, so that a process that measures AutoGen never loads LangChain.
    from benchmarks.scripted_model import LOOKUP, ScriptedModel
    from langchain.agents import create_agent

    agent = create_agent(ScriptedModel(), [LOOKUP], system_prompt=PROMPT)
    question: Any = {"messages": [("user", QUESTION)]}
    modes: Any = ["updates", "messages"]

    async def astream() -> None:
        async for _ in agent.astream(question, config, stream_mode=modes):
            pass

    async def at_once() -> None:
        await asyncio.gather(*(agent.ainvoke(question, config) for _ in range(50)))

    return [
        Workload("invoke", 1, lambda: agent.invoke(question, config)),
        Workload("ainvoke", 1, lambda: loop.run_until_complete(agent.ainvoke(question, config))),
        Workload("stream", 1, lambda: list(agent.stream(question, config, stream_mode=modes))),
        Workload("astream", 1, lambda: loop.run_until_complete(astream())),
        Workload("50 at once", 50, lambda: loop.run_until_complete(at_once())),
    ]


def _autogen(loop: asyncio.AbstractEventLoop) -> list[Workload]:
    """A planner and an executor: six model calls through AutoGen's OpenAI client, four tool calls."""
    make_team = _team_maker()

    async def run() -> None:
        await make_team(stream=False).run(task=QUESTION)

    async def run_stream() -> None:
        async for _ in make_team(stream=True).run_stream(task=QUESTION):
            pass

    async def at_once() -> None:
        await asyncio.gather(*(run() for _ in range(20)))

    ways: Sequence[tuple[str, int, Callable[[], Coroutine[Any, Any, None]]]] = [
        ("run", 1, run),
        ("run_stream", 1, run_stream),
        ("20 at once", 20, at_once),
    ]
    return [Workload(name, agents, lambda way=way: loop.run_until_complete(way())) for name, agents, way in ways]


def _team_maker() -> Callable[..., Any]:
    import httpx2
    from autogen_agentchat.agents import AssistantAgent
    from autogen_agentchat.conditions import TextMentionTermination
    from autogen_agentchat.teams import RoundRobinGroupChat
    from autogen_core.models import ModelInfo
    from autogen_ext.models.openai import OpenAIChatCompletionClient

    async def lookup(key: str) -> str:
        """Look a fact up."""
        return f"{key}: {FACT}"

    info: ModelInfo = {
        "vision": False,
        "function_calling": True,
        "json_output": False,
        "family": "unknown",
        "structured_output": False,
    }
    client = OpenAIChatCompletionClient(
        model="tiny",
        base_url="http://engine/v1",
        api_key="none",
        model_info=info,
        http_client=httpx2.AsyncClient(transport=httpx2.MockTransport(_engine())),
    )

    def make_team(*, stream: bool) -> RoundRobinGroupChat:
        planner = AssistantAgent("planner", client, system_message="You plan.", model_client_stream=stream)
        executor = AssistantAgent(
            "executor",
            client,
            tools=[lookup],
            system_message=PROMPT,
            model_client_stream=stream,
            max_tool_iterations=TOOL_CALLS + 1,
        )
        return RoundRobinGroupChat([planner, executor], termination_condition=TextMentionTermination("TERMINATE"))

    return make_team


def _engine() -> Callable[[Any], Any]:
    """Answers like the tests' server, without a socket: an agent with tools calls them, then ends the run."""
    import httpx2

    from tests.vllm_server import RecordedRequest, ResponseBuilder

    numbers = count()

    def answer(request: httpx2.Request) -> httpx2.Response:
        body = json.loads(request.content)
        done = sum(message["role"] == "tool" for message in body["messages"])
        call = _lookup_call(done) if body.get("tools") and done < TOOL_CALLS else None
        words = (FACT, "; ", "TERMINATE") if body.get("tools") else ("Look up", " four", " facts.")
        given = ResponseBuilder(RecordedRequest({}, body, f"chatcmpl-{next(numbers)}"), words, call)
        if not body.get("stream"):
            return httpx2.Response(200, json=given.whole())
        events = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in given.chunks())
        return httpx2.Response(200, headers={"content-type": "text/event-stream"}, text=events + "data: [DONE]\n\n")

    return answer


def _lookup_call(number: int) -> dict[str, Any]:
    function = {"name": "lookup", "arguments": json.dumps({"key": f"fact {number}"})}
    return {"id": f"call_{number}", "type": "function", "function": function}
