"""Token ids without a gateway: the client requests them from the server and hides them from the user."""

import logging
from typing import Any

import pytest
from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.teams import RoundRobinGroupChat
from autogen_core import InMemoryStore
from autogen_core.logging import LLMCallEvent
from autogen_core.models import ChatCompletionClient, CreateResult, UserMessage
from autogen_ext.models.cache import ChatCompletionCache
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from pydantic import BaseModel

import agl
from agl.otlp import decode
from agl.tokens.packing import pack_ids, pack_logprobs
from agl.trajectory import build_trajectory
from tests.autogen.conftest import MODEL_INFO, SwitchOn
from tests.autogen.span_tree import attributes, only
from tests.vllm_server import LOGPROBS, PROMPT_IDS, TOKEN_IDS

ASK = [UserMessage(content="How many mugs?", source="user")]


class Count(BaseModel):
    mugs: int


async def ask(client: ChatCompletionClient, *, stream: bool, **options: Any) -> CreateResult:
    if not stream:
        return await client.create(ASK, **options)
    result = [item async for item in client.create_stream(ASK, **options)][-1]
    assert isinstance(result, CreateResult)
    return result


@pytest.mark.parametrize("stream", [False, True])
async def test_ids_and_logprobs_are_on_the_span_and_the_user_sees_none(spans, switch_on: SwitchOn, client, stream):
    switch_on(capture_token_ids=True)
    result = await ask(client("planner"), stream=stream)
    span = attributes(only(spans.get_finished_spans(), "chat planner"))
    assert span["agl.prompt.token_ids"] == pack_ids(PROMPT_IDS)
    assert span["agl.response.token_ids"] == pack_ids(TOKEN_IDS)
    assert span["agl.response.logprobs"] == pack_logprobs(LOGPROBS)
    assert (result.content, result.logprobs) == ("Seven mugs TERMINATE", None)


@pytest.mark.parametrize("stream", [False, True])
async def test_ids_are_requested_only_with_capture_token_ids(spans, client, server, stream):
    await ask(client("planner"), stream=stream)
    assert not {"return_token_ids", "logprobs"} & set(server.seen[0].body)


async def test_logprobs_without_ids_are_not_on_the_span(spans, client):
    await ask(client("planner", logprobs=True), stream=False)
    span = attributes(only(spans.get_finished_spans(), "chat planner"))
    assert "agl.response.logprobs" not in span and "gen_ai.response.id" in span


async def test_a_user_who_asks_for_logprobs_gets_them(spans, switch_on: SwitchOn, client):
    switch_on(capture_token_ids=True)
    result = await ask(client("planner"), stream=False, extra_create_args={"logprobs": True})
    assert [token.logprob for token in result.logprobs or []] == LOGPROBS


async def test_the_users_extra_body_stays(spans, switch_on: SwitchOn, client, server):
    switch_on(capture_token_ids=True)
    extra = {"top_k": 5}
    await ask(client("planner", extra_body=extra), stream=False)
    assert (server.seen[0].body["top_k"], server.seen[0].body["return_token_ids"]) == (5, True)
    assert extra == {"top_k": 5}


async def test_the_log_of_autogen_has_only_fields_that_the_user_requested(spans, switch_on: SwitchOn, client, caplog):
    switch_on(capture_token_ids=True)
    with caplog.at_level(logging.INFO, "autogen_core.events"):
        await ask(client("planner"), stream=False)
    (event,) = [record.msg for record in caplog.records if isinstance(record.msg, LLMCallEvent)]
    response = event.kwargs["response"]
    assert response["prompt_token_ids"] is None
    assert (response["choices"][0]["token_ids"], response["choices"][0]["logprobs"]) == (None, None)
    assert response["choices"][0]["message"]["content"] == "Seven mugs TERMINATE"


async def test_a_cached_result_has_only_fields_that_the_user_requested(spans, switch_on: SwitchOn, client):
    switch_on(capture_token_ids=True)
    cached = ChatCompletionCache(client("planner"), InMemoryStore())
    await cached.create(ASK)
    again = await cached.create(ASK)
    assert again.cached
    assert again.logprobs is None


@pytest.mark.parametrize("stream", [False, True])
async def test_a_structured_output_has_ids(spans, switch_on: SwitchOn, client, server, stream):
    switch_on(capture_token_ids=True)
    server.words = ('{"mugs"', ": ", "7}")
    made = client("planner", model_info=MODEL_INFO | {"structured_output": True, "json_output": True})
    result = await ask(made, stream=stream, json_output=Count)
    assert Count.model_validate_json(str(result.content)).mugs == 7
    span = attributes(only(spans.get_finished_spans(), "chat planner"))
    assert span["agl.response.token_ids"] == pack_ids(TOKEN_IDS)
    assert result.logprobs is None


@pytest.mark.parametrize("stream", [False, True])
async def test_a_team_is_trainable_without_a_gateway(spans, switch_on: SwitchOn, client, stream):
    switch_on(capture_token_ids=True)
    agents = [AssistantAgent(name, client(name), model_client_stream=stream) for name in ("planner", "executor")]
    spans.clear()
    with agl.rollout("r1"):
        await RoundRobinGroupChat([*agents], max_turns=2).run(task="How many mugs?")
        agl.emit_reward(1.0)

    sent = encode_spans(spans.get_finished_spans()).SerializeToString()
    trajectory = build_trajectory(decode(sent))
    assert (trajectory.rollout_id, trajectory.reward, trajectory.drops) == ("r1", 1.0, [])
    for row, role in zip(trajectory.rows, ("planner", "executor"), strict=True):
        assert (row.role, row.token_ids) == (role, [*PROMPT_IDS, *TOKEN_IDS])
        assert row.loss_mask == [0, 0, 0, 1, 1, 1]
