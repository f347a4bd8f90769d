"""Agents with plug-in, collector, gateway and store: calls are joined, with roles and ids."""

from collections.abc import Iterator
from typing import Any, TypedDict

import pytest
from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.conditions import MaxMessageTermination
from autogen_agentchat.teams import RoundRobinGroupChat
from autogen_ext.models.openai import OpenAIChatCompletionClient
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph
from openai import DefaultHttpxClient, OpenAI

import agl
from agl.server.app_thread import AppThread
from agl.server_thread import ServerThread
from agl.store import Store, open_store
from agl.trajectory import DropReason, Trajectory, build_trajectory
from agl_autogen import AutoGenInstrumentor
from agl_langchain import LangChainInstrumentor
from tests.core.fake_engine import PROMPT_IDS, FakeEngine, logprob, token_id

ANSWER_IDS = [token_id(0, position) for position in range(3)]
ANSWER_LOGPROBS = [logprob(0, position) for position in range(3)]


@pytest.fixture
def store() -> Iterator[Store]:
    store = open_store("memory://")
    yield store
    store.close()


@pytest.fixture
def gateway(store: Store) -> Iterator[str]:
    """Base URL for clients; spans of this process go to the same server."""
    with ServerThread(store, port=0, otlp_http_port=0, upstream=FakeEngine().app) as server:
        agl.init(endpoint=server.otlp_url)
        yield f"{server.base_url}/v1"
        agl.shutdown()


@pytest.fixture
def langchain() -> Iterator[None]:
    LangChainInstrumentor().instrument()
    yield
    LangChainInstrumentor().uninstrument()


@pytest.fixture
def autogen() -> Iterator[None]:
    AutoGenInstrumentor().instrument()
    yield
    AutoGenInstrumentor().uninstrument()


def captured(store: Store, rollout_id: str) -> Trajectory:
    assert agl.flush()
    return build_trajectory(store.query_spans(rollout_id))


def check_calls(trajectory: Trajectory, roles: list[str]) -> None:
    assert [call.role for call in trajectory.calls] == roles
    assert trajectory.drops == []
    for call in trajectory.calls:
        assert call.through_gateway
        assert call.chat_span_id is not None
        assert (call.prompt_ids, call.response_ids, call.logprobs) == (PROMPT_IDS, ANSWER_IDS, ANSWER_LOGPROBS)
        assert call.policy_version == "writer@3"
    assert sum(sum(row.loss_mask) for row in trajectory.rows) == len(roles) * len(ANSWER_IDS)


class Text(TypedDict):
    text: str


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streaming"])
def test_a_langgraph_agent(store: Store, gateway: str, langchain: None, streaming: bool) -> None:
    # A client of its own, closed here: LangChain caches the default one for the life of the process.
    with DefaultHttpxClient() as http_client:
        model = ChatOpenAI(
            model="writer@3", base_url=gateway, api_key="none", streaming=streaming, http_client=http_client
        )
        graph = StateGraph(Text)
        for name in ("writer", "fixer"):
            graph.add_node(name, lambda state: {"text": model.invoke(state["text"]).content})
        graph.add_edge(START, "writer").add_edge("writer", "fixer").add_edge("fixer", END)
        with agl.rollout("lg-1", group_id="task-1"):
            graph.compile().invoke({"text": "hello"})
            agl.emit_reward(0.5)
    trajectory = captured(store, "lg-1")
    check_calls(trajectory, ["writer", "fixer"])
    assert (trajectory.group_id, trajectory.mode, trajectory.reward) == ("task-1", "train", 0.5)
    assert [row.reward for row in trajectory.rows] == [0.5, 0.5]


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streaming"])
async def test_an_autogen_team(store: Store, gateway: str, autogen: None, streaming: bool) -> None:
    info: Any = {"vision": False, "function_calling": True, "json_output": False, "family": "unknown"}
    client = OpenAIChatCompletionClient(
        model="writer@3", base_url=gateway, api_key="none", model_info=info | {"structured_output": False}
    )
    agents = [
        AssistantAgent(name, model_client=client, model_client_stream=streaming) for name in ("planner", "executor")
    ]
    team = RoundRobinGroupChat([*agents], termination_condition=MaxMessageTermination(3))
    async with agl.rollout("ag-1"):
        await team.run(task="hello")
    await client.close()
    check_calls(captured(store, "ag-1"), ["planner", "executor"])


def test_a_plain_client_of_the_rollout_url_needs_no_plugin(store: Store, gateway: str) -> None:
    base_url = gateway.replace("/v1", "/rollout/plain-1/attempt/plain-1-a1/v1")
    with OpenAI(base_url=base_url, api_key="none") as client:
        client.chat.completions.create(model="writer@3", messages=[{"role": "user", "content": "hello"}])
    (call,) = captured(store, "plain-1").calls
    assert (call.role, call.attempt_id, call.response_ids) == ("writer", "plain-1-a1", ANSWER_IDS)


def test_a_call_past_the_gateway_says_what_to_set(store: Store, gateway: str, langchain: None) -> None:
    engine = AppThread()
    url = engine.add(FakeEngine().app) + "/v1"
    with engine, DefaultHttpxClient() as http_client, agl.rollout("past-1"):
        ChatOpenAI(model="writer@3", base_url=url, api_key="none", http_client=http_client).invoke("hello")
    (drop,) = captured(store, "past-1").drops
    assert drop.reason is DropReason.NO_IDS
    assert "point the model's base URL at the gateway" in drop.detail
