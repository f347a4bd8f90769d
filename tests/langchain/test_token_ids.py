"""Token ids without a gateway: on the span in every mode, and hidden from the agent."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.language_models import FakeListChatModel
from langchain_core.messages import HumanMessage
from langchain_core.outputs import LLMResult
from langchain_openai import ChatOpenAI
from openai import BadRequestError
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from pydantic import BaseModel

import agl
from agl.errors import ConfigError
from agl.otlp import decode
from agl.tokens.packing import pack_ids, pack_logprobs
from agl.trajectory import Trajectory, build_trajectory
from agl_langchain import AglCallbackHandler, capture_token_ids
from tests.autogen.span_tree import attributes, named, only, tree
from tests.langchain.agents import STOCK, two_async_roles, two_roles
from tests.langchain.conftest import MakeModel
from tests.langchain.modes import MODES, Mode
from tests.vllm_server import LOGPROBS, PROMPT_IDS, TOKEN_IDS, FakeVllmServer

TOKENS = {
    "agl.prompt.token_ids": pack_ids(PROMPT_IDS),
    "agl.response.token_ids": pack_ids(TOKEN_IDS),
    "agl.response.logprobs": pack_logprobs(LOGPROBS),
}


class Count(BaseModel):
    """A count."""

    count: int


def tokens_on(span: ReadableSpan) -> dict[str, object]:
    return {name: value for name, value in attributes(span).items() if name in TOKENS}


@pytest.mark.parametrize("mode", MODES)
async def test_ids_and_logprobs_are_on_the_span_of_the_call(
    mode: Mode, instrumented: InMemorySpanExporter, server: FakeVllmServer, make_model: MakeModel
) -> None:
    await mode(capture_token_ids(make_model()), "How many mugs?", {})

    span = only(instrumented.get_finished_spans(), "chat tiny")
    assert tokens_on(span) == TOKENS
    assert attributes(span)["gen_ai.response.id"] == server.seen[0].response_id  # streaming included


@pytest.mark.parametrize("mode", MODES)
async def test_the_agent_sees_what_it_saw_without_capture(
    mode: Mode, instrumented: InMemorySpanExporter, server: FakeVllmServer, make_model: MakeModel
) -> None:
    def seen(answer: Any) -> str:
        dumped = [message.model_dump(exclude={"id"}) for message in (answer if isinstance(answer, list) else [answer])]
        return json.dumps(dumped).replace(server.seen[-1].response_id, "id")

    server.words = ("Seven", "", " mugs")  # the server sends a chunk for the empty word only if ids are requested
    plain = seen(await mode(make_model(), "How many mugs?", {}))
    captured = seen(await mode(capture_token_ids(make_model()), "How many mugs?", {}))

    assert captured == plain
    assert [tokens_on(span) for span in instrumented.get_finished_spans()] == [{}, TOKENS]


@pytest.mark.parametrize("mode", MODES)
async def test_what_the_agent_asked_for_stays(
    mode: Mode, instrumented: InMemorySpanExporter, server: FakeVllmServer, make_model: MakeModel
) -> None:
    model = capture_token_ids(make_model(logprobs=True, extra_body={"top_k": 5}))

    answer = await mode(model, "How many mugs?", {})

    answers = answer if isinstance(answer, list) else [answer]
    shown = [message.response_metadata.get("logprobs") for message in answers]
    assert [entry["logprob"] for part in shown if part for entry in part["content"]] == LOGPROBS
    assert server.seen[0].body["top_k"] == 5 and server.seen[0].body["return_token_ids"] is True
    assert tokens_on(only(instrumented.get_finished_spans(), "chat tiny")) == TOKENS


@pytest.mark.parametrize("mode", MODES)
async def test_structured_output_is_captured_and_stays_structured(
    mode: Mode, instrumented: InMemorySpanExporter, server: FakeVllmServer, make_model: MakeModel
) -> None:
    server.words = ('{"count"', ": 7", "}")
    model = capture_token_ids(make_model()).with_structured_output(Count, method="json_schema")

    answer = await mode(model, "How many mugs?", {})

    assert (answer[-1] if isinstance(answer, list) else answer) == Count(count=7)
    assert tokens_on(only(instrumented.get_finished_spans(), "chat tiny")) == TOKENS


@pytest.mark.parametrize("mode", MODES)
async def test_a_tool_call_is_captured(mode: Mode, instrumented: InMemorySpanExporter, make_model: MakeModel) -> None:
    await mode(capture_token_ids(make_model()).bind_tools([STOCK]), "How many mugs?", {})

    span = only(instrumented.get_finished_spans(), "chat tiny")
    assert tokens_on(span) == TOKENS and '"name":"stock"' in str(attributes(span)["gen_ai.output.messages"])


@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
async def test_events_of_a_model_are_captured(
    version: Any, instrumented: InMemorySpanExporter, make_model: MakeModel
) -> None:
    events = capture_token_ids(make_model()).astream_events("How many mugs?", version=version)
    async for _ in await events if version == "v3" else events:
        pass
    await asyncio.sleep(0.05)  # v3 reports the end in a task of its own

    assert tokens_on(only(instrumented.get_finished_spans(), "chat tiny")) == TOKENS


async def test_a_model_with_streaming_enabled_is_captured_when_invoked(
    instrumented: InMemorySpanExporter, make_model: MakeModel
) -> None:
    model = capture_token_ids(make_model(streaming=True))

    await model.ainvoke("How many?")
    model.invoke("How many?")

    assert [tokens_on(span) for span in instrumented.get_finished_spans()] == [TOKENS, TOKENS]


@pytest.mark.parametrize("mode", MODES)
async def test_each_choice_of_several_trains(
    mode: Mode, instrumented: InMemorySpanExporter, make_model: MakeModel
) -> None:
    async with agl.rollout("r1"), agl.role("writer"):
        await mode(capture_token_ids(make_model(n=2)), "How many mugs?", {})

    spans = instrumented.get_finished_spans()
    assert tree(spans) == ("agl.rollout\n  chat tiny [writer]\n    chat choice 0 [writer]\n    chat choice 1 [writer]")
    assert tokens_on(only(spans, "chat tiny")) == tokens_on(only(spans, "chat choice 0")) == TOKENS
    rows = trajectory_of(spans).rows
    assert [row.token_ids for row in rows] == [PROMPT_IDS + TOKEN_IDS, [*PROMPT_IDS, 311, 312, 313]]
    assert {row.role for row in rows} == {"writer"}


@pytest.mark.parametrize("streaming", [False, True])
async def test_conversations_of_one_generate_keep_their_own_ids(
    streaming: bool, instrumented: InMemorySpanExporter, server: FakeVllmServer, make_model: MakeModel
) -> None:
    """Their runs share a context, so none of them is current."""
    model = capture_token_ids(make_model(streaming=streaming))

    await model.agenerate([[HumanMessage("one")], [HumanMessage("two")]])
    model.generate([[HumanMessage("one")], [HumanMessage("two")]])

    spans = instrumented.get_finished_spans()
    assert [tokens_on(span) for span in spans] == [TOKENS] * 4
    asked = {seen.response_id: seen.body["messages"][0]["content"] for seen in server.seen}
    ids = [str(attributes(span)["gen_ai.response.id"]) for span in spans]
    assert sorted(ids) == sorted(asked)
    for span, response_id in zip(spans, ids, strict=True):
        assert asked[response_id] in str(attributes(span)["gen_ai.input.messages"])


async def test_concurrent_agents_keep_their_own_ids(
    instrumented: InMemorySpanExporter, server: FakeVllmServer, make_model: MakeModel
) -> None:
    agent = two_async_roles(capture_token_ids(make_model()))

    async def run(number: int) -> None:
        async with agl.rollout(f"r{number}"):
            value = {"messages": [("user", f"r{number}")]}
            if number % 2:
                await agent.ainvoke(value)
            else:
                [_ async for _ in agent.astream(value, stream_mode="messages")]

    await asyncio.gather(*(run(number) for number in range(20)))

    asked = {seen.response_id: seen.body["messages"][0]["content"] for seen in server.seen}
    calls = named(instrumented.get_finished_spans(), "chat tiny")
    assert len(calls) == 40
    for span in calls:
        assert tokens_on(span) == TOKENS
        assert asked[str(attributes(span)["gen_ai.response.id"])] == attributes(span)["agl.rollout.id"]


def trajectory_of(spans: tuple[ReadableSpan, ...]) -> Trajectory:
    """The trajectory that the collector builds from exported spans."""
    return build_trajectory(decode(encode_spans(spans).SerializeToString()))


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streaming"])
def test_captured_spans_become_a_trajectory_that_trains(
    streaming: bool, instrumented: InMemorySpanExporter, make_model: MakeModel
) -> None:
    with agl.rollout("r1", group_id="g1"):
        two_roles(capture_token_ids(make_model(streaming=streaming))).invoke({"messages": [("user", "How many?")]})
        agl.emit_reward(0.5)

    trajectory = trajectory_of(instrumented.get_finished_spans())
    assert trajectory.drops == []
    assert [row.role for row in trajectory.rows] == ["planner", "executor"]
    for row in trajectory.rows:
        assert row.token_ids == PROMPT_IDS + TOKEN_IDS
        assert row.loss_mask == [0, 0, 0, 1, 1, 1]
        assert row.logprobs == [0.0, 0.0, 0.0, *LOGPROBS]
        assert row.reward == 0.5


def test_an_abandoned_stream_has_the_ids_received_so_far(
    instrumented: InMemorySpanExporter, make_model: MakeModel
) -> None:
    for chunk in capture_token_ids(make_model()).stream("How many mugs?"):
        if chunk.content:
            break

    found = tokens_on(only(instrumented.get_finished_spans(), "chat tiny"))
    assert found["agl.response.token_ids"] == pack_ids(TOKEN_IDS[:1])


def test_a_failed_request_has_none(instrumented: InMemorySpanExporter, make_model: MakeModel) -> None:
    with pytest.raises(BadRequestError, match="boom"):
        capture_token_ids(make_model()).invoke("FAIL")

    assert tokens_on(only(instrumented.get_finished_spans(), "chat tiny")) == {}


def test_redaction_does_not_apply_to_token_ids(spans: InMemorySpanExporter, make_model: MakeModel) -> None:
    handler = AglCallbackHandler(redact=lambda _: "-")

    capture_token_ids(make_model()).invoke("How many mugs?", {"callbacks": [handler]})

    assert tokens_on(only(spans.get_finished_spans(), "chat tiny")) == TOKENS


def test_an_untraced_call_requests_no_ids(server: FakeVllmServer, make_model: MakeModel) -> None:
    capture_token_ids(make_model()).invoke("How many mugs?")

    assert {"return_token_ids", "logprobs"} & set(server.seen[0].body) == set()


def test_other_models_do_not_change(
    instrumented: InMemorySpanExporter, server: FakeVllmServer, make_model: MakeModel
) -> None:
    captured, other = make_model(), make_model()

    assert capture_token_ids(captured) is captured and capture_token_ids(captured) is captured
    other.invoke("How many mugs?")

    assert "return_token_ids" not in server.seen[0].body
    assert type(other) is ChatOpenAI and isinstance(captured, ChatOpenAI)


def test_a_captured_model_keeps_its_name_and_its_copies_are_captured(
    instrumented: InMemorySpanExporter, make_model: MakeModel
) -> None:
    model = capture_token_ids(make_model())

    assert repr(type(model)) == repr(ChatOpenAI) and model.lc_id() == ChatOpenAI.lc_id()
    assert model.model_copy().invoke("How many mugs?").content == "Seven mugs TERMINATE"

    found = attributes(only(instrumented.get_finished_spans(), "chat tiny"))
    assert found["gen_ai.provider.name"] == "openai" and "agl.response.token_ids" in found


def test_other_handlers_see_no_logprobs(instrumented: InMemorySpanExporter, make_model: MakeModel) -> None:
    seen: list[Any] = []

    class Watcher(BaseCallbackHandler):
        def on_llm_new_token(self, token: Any, *, chunk: Any = None, **event: Any) -> None:
            seen.append(event.get("logprobs") or (chunk and (chunk.generation_info or {}).get("logprobs")))

        def on_llm_end(self, response: LLMResult, **event: Any) -> None:
            seen.append((response.generations[0][0].generation_info or {}).get("logprobs"))

    model = capture_token_ids(make_model())
    model.invoke("How many mugs?", {"callbacks": [Watcher()]})
    list(model.stream("How many mugs?", {"callbacks": [Watcher()]}))

    assert len(seen) > 4 and set(seen) == {None}


@pytest.mark.parametrize(
    "make", [lambda model: FakeListChatModel(responses=["x"]), lambda model: model.bind_tools([STOCK])]
)
def test_other_objects_than_openai_chat_models_are_refused(make: Callable[[Any], Any], make_model: MakeModel) -> None:
    with pytest.raises(ConfigError, match="expected a ChatOpenAI itself, before tools or a schema are bound to it"):
        capture_token_ids(make(make_model()))
