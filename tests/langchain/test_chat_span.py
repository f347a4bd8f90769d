"""Attributes of a model call's span: exact names, types and values, in every mode."""

import base64
import hashlib
import json
import random
from datetime import datetime

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.language_models import FakeListChatModel, FakeListLLM, GenericFakeChatModel
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolCall, ToolMessage
from langchain_core.tools import StructuredTool, tool
from langchain_openai import OpenAI
from openai import BadRequestError
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from pydantic import BaseModel

import agl
from agl_langchain import AglCallbackHandler
from tests.autogen.span_tree import attributes, named, only
from tests.langchain.conftest import MakeModel
from tests.langchain.modes import MODES, STREAMS, Mode
from tests.vllm_server import FakeVllmServer

QUESTION = [SystemMessage("Be brief."), HumanMessage("How many mugs?")]
ANSWER = [
    {"role": "assistant", "parts": [{"type": "text", "content": "Seven mugs TERMINATE"}], "finish_reason": "stop"}
]


class Asked(BaseModel):
    """Arguments of a tool."""

    at: datetime
    of: dict[str, int]


@tool
def stock(item: str) -> int:
    """Count an item in stock."""
    return 7


@pytest.mark.parametrize("mode", MODES)
async def test_a_call_has_every_attribute_of_the_conventions(
    mode: Mode, spans: InMemorySpanExporter, server: FakeVllmServer, make_model: MakeModel
) -> None:
    model = make_model(temperature=0.5, max_tokens=64, stream_usage=True)

    await mode(model, QUESTION, {"callbacks": [AglCallbackHandler()]})

    span = only(spans.get_finished_spans(), "chat tiny")
    found = attributes(span)
    streamed = mode in STREAMS
    assert found.pop("gen_ai.response.id", None) == (None if streamed else server.seen[0].response_id)
    assert json.loads(str(found.pop("gen_ai.input.messages"))) == [
        {"role": "system", "parts": [{"type": "text", "content": "Be brief."}]},
        {"role": "user", "parts": [{"type": "text", "content": "How many mugs?"}]},
    ]
    assert json.loads(str(found.pop("gen_ai.output.messages"))) == ANSWER
    assert found == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": "tiny",
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.max_tokens": 64,
        "gen_ai.response.model": "tiny",
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.usage.input_tokens": 11,
        "gen_ai.usage.output_tokens": 3,
    }
    assert span.kind is SpanKind.CLIENT and span.status.is_unset


@pytest.mark.parametrize("mode", MODES)
async def test_a_tool_call_is_a_part_and_the_tools_are_defined(
    mode: Mode, spans: InMemorySpanExporter, make_model: MakeModel
) -> None:
    await mode(make_model().bind_tools([stock]), QUESTION, {"callbacks": [AglCallbackHandler()]})

    found = attributes(only(spans.get_finished_spans(), "chat tiny"))
    part = {"type": "tool_call", "id": "call_1", "name": "stock", "arguments": {"item": "mug"}}
    assert json.loads(str(found["gen_ai.output.messages"])) == [
        {"role": "assistant", "parts": [part], "finish_reason": "tool_calls"}
    ]
    (definition,) = json.loads(str(found["gen_ai.tool.definitions"]))
    assert (definition["type"], definition["function"]["name"]) == ("function", "stock")


async def test_a_conversation_keeps_calls_results_reasoning_and_images(spans: InMemorySpanExporter) -> None:
    call = {"name": "stock", "args": {"item": "mug"}, "id": "c1", "type": "tool_call"}
    image = {"type": "image_url", "image_url": {"url": "https://shop/mug.png"}}
    conversation = [
        HumanMessage([{"type": "text", "text": "This one?"}, image]),
        AIMessage([{"type": "reasoning", "reasoning": "Look it up."}], tool_calls=[call]),
        ToolMessage("7", tool_call_id="c1"),
    ]

    FakeListChatModel(responses=["Seven."]).invoke(conversation, {"callbacks": [AglCallbackHandler()]})

    found = attributes(only(spans.get_finished_spans(), "chat"))
    user, assistant, result = json.loads(str(found["gen_ai.input.messages"]))
    assert user["parts"] == [
        {"type": "text", "content": "This one?"},
        {"type": "uri", "modality": "image", "uri": "https://shop/mug.png"},
    ]
    assert assistant["parts"] == [
        {"type": "reasoning", "content": "Look it up."},
        {"type": "tool_call", "id": "c1", "name": "stock", "arguments": {"item": "mug"}},
    ]
    assert result == {"role": "tool", "parts": [{"type": "tool_call_response", "id": "c1", "response": "7"}]}


@pytest.mark.parametrize("mode", MODES)
async def test_a_model_that_is_not_openai_has_its_span(mode: Mode, spans: InMemorySpanExporter) -> None:
    await mode(FakeListChatModel(responses=["Seven."]), QUESTION, {"callbacks": [AglCallbackHandler()]})

    found = attributes(only(spans.get_finished_spans(), "chat"))
    assert found["gen_ai.provider.name"] == "fakelistchatmodel"
    (message,) = json.loads(str(found["gen_ai.output.messages"]))
    assert message["parts"] == [{"type": "text", "content": "Seven."}]


async def test_a_completion_model_has_a_text_completion_span(
    spans: InMemorySpanExporter, server: FakeVllmServer
) -> None:
    model = OpenAI(model="tiny", base_url=server.base_url, api_key="none", max_retries=0)  # type: ignore[arg-type]

    model.invoke("How many mugs?", {"callbacks": [AglCallbackHandler()]})

    found = attributes(only(spans.get_finished_spans(), "text_completion tiny"))
    assert found["gen_ai.operation.name"] == "text_completion"
    assert json.loads(str(found["gen_ai.input.messages"]))[0]["parts"][0]["content"] == "How many mugs?"
    assert json.loads(str(found["gen_ai.output.messages"])) == ANSWER
    assert (found["gen_ai.usage.input_tokens"], found["gen_ai.usage.output_tokens"]) == (11, 3)


async def test_a_completion_model_that_is_not_openai_has_its_span(spans: InMemorySpanExporter) -> None:
    FakeListLLM(responses=["Seven."]).invoke("How many?", {"callbacks": [AglCallbackHandler()]})

    assert "gen_ai.output.messages" in attributes(only(spans.get_finished_spans(), "text_completion"))


async def test_conversations_of_one_generate_keep_their_own_answers(spans: InMemorySpanExporter) -> None:
    """`generate` with two conversations starts two runs, each with its own response."""
    FakeListChatModel(responses=["one", "two"]).generate(
        [[HumanMessage("a")], [HumanMessage("b")]], callbacks=[AglCallbackHandler()]
    )

    said = [json.loads(str(attributes(span)["gen_ai.output.messages"])) for span in spans.get_finished_spans()]
    assert [messages[0]["parts"][0]["content"] for messages in said] == ["one", "two"]


@pytest.mark.parametrize("mode", MODES)
async def test_a_model_error_ends_the_span_with_its_type(
    mode: Mode, spans: InMemorySpanExporter, make_model: MakeModel
) -> None:
    with pytest.raises(BadRequestError, match="boom") as raised:
        await mode(make_model(), "FAIL", {"callbacks": [AglCallbackHandler()]})

    span = only(spans.get_finished_spans(), "chat tiny")
    assert attributes(span)["error.type"] == type(raised.value).__qualname__
    assert span.status.status_code is StatusCode.ERROR
    assert [event.name for event in span.events] == ["exception"]


def test_content_stays_off_the_span_by_switch_or_environment(
    spans: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = FakeListChatModel(responses=["Seven."])
    content = {"gen_ai.input.messages", "gen_ai.output.messages"}

    def captured(switch: bool | None) -> set[str]:
        spans.clear()
        model.invoke(QUESTION, {"callbacks": [AglCallbackHandler(capture_content=switch)]})
        return content & set(attributes(only(spans.get_finished_spans(), "chat")))

    assert captured(None) == content  # on by default, because training needs it
    assert captured(False) == set()
    for off in ("false", "NO_CONTENT", "EVENT_ONLY"):
        monkeypatch.setenv("OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT", off)
        assert captured(None) == set()
        assert captured(True) == content
    monkeypatch.setenv("OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT", "SPAN_ONLY")
    assert captured(None) == content


@pytest.mark.parametrize("mode", STREAMS)
async def test_with_the_instrumentor_a_streamed_call_has_its_response_id(
    mode: Mode, instrumented: InMemorySpanExporter, server: FakeVllmServer, make_model: MakeModel
) -> None:
    await mode(make_model(), QUESTION, {})

    call = only(instrumented.get_finished_spans(), "chat tiny")
    assert attributes(call)["gen_ai.response.id"] == server.seen[0].response_id


def test_interleaved_streams_have_their_own_response_ids(
    instrumented: InMemorySpanExporter, server: FakeVllmServer, make_model: MakeModel
) -> None:
    first, second = make_model("first"), make_model("second")

    for _ in zip(first.stream("one"), second.stream("two"), strict=True):
        pass

    asked = {seen.body["model"]: seen.response_id for seen in server.seen}
    for name, response_id in asked.items():
        assert attributes(only(instrumented.get_finished_spans(), f"chat {name}"))["gen_ai.response.id"] == response_id


def test_text_that_utf8_cannot_encode_is_escaped(spans: InMemorySpanExporter) -> None:
    half = "\ud83d"  # half of an emoji, as a truncated response can contain

    FakeListChatModel(responses=["Seven."]).invoke(f"How many {half}?", {"callbacks": [AglCallbackHandler()]})

    said = str(attributes(only(spans.get_finished_spans(), "chat"))["gen_ai.input.messages"])
    assert said.isascii() and json.loads(said)[0]["parts"][0]["content"] == f"How many {half}?"


def test_arguments_that_json_has_no_form_for_are_written(spans: InMemorySpanExporter) -> None:
    huge, asked = 2**70, datetime(2026, 1, 2, 3, 4)
    count = StructuredTool.from_function(lambda **_: {1: huge}, name="count", description="Counts.", args_schema=Asked)

    count.invoke({"at": asked, "of": {"huge": huge}}, {"callbacks": [AglCallbackHandler()]})

    found = attributes(only(spans.get_finished_spans(), "execute_tool count"))
    assert json.loads(str(found["gen_ai.tool.call.arguments"])) == {"at": "2026-01-02 03:04:00", "of": {"huge": huge}}
    assert json.loads(str(found["gen_ai.tool.call.result"])) == {"1": huge}


async def test_large_media_are_on_one_span_of_a_rollout_only(instrumented: InMemorySpanExporter) -> None:
    data = random.Random(1).randbytes(20_000)
    encoded, digest = base64.b64encode(data).decode(), hashlib.sha256(data).hexdigest()
    blocks = [
        {"type": "image_url", "image_url": {"url": f"data:image/webp;base64,{encoded}"}},
        {"type": "image", "source": {"type": "base64", "media_type": "image/webp", "data": encoded}},
        {"type": "audio", "base64": encoded, "mime_type": "audio/wav"},
    ]
    with agl.rollout("media"):
        for _ in range(2):
            FakeListChatModel(responses=["yes"]).invoke([HumanMessage(blocks)])

    found = [attributes(span) for span in named(instrumented.get_finished_spans(), "chat")]
    for one in found:
        text = str(one["gen_ai.input.messages"])
        assert text.count(f"bytes=20000;sha256={digest}") == 3 and len(text) < 1000
    assert [one.get(f"agl.media.{digest}") for one in found] == [data, None]


def test_text_beyond_the_limit_is_cut(instrumented: InMemorySpanExporter) -> None:
    StructuredTool.from_function(lambda q: "y " * 2_000_000, name="look", description="d").invoke({"q": "x"})

    result = str(attributes(only(instrumented.get_finished_spans(), "execute_tool look"))["gen_ai.tool.call.result"])
    assert json.loads(result).endswith("... (cut: 4000000 bytes)") and len(result) < 1_050_000


def test_an_answer_of_langchains_cache_is_marked(instrumented: InMemorySpanExporter) -> None:
    model = GenericFakeChatModel(messages=iter([AIMessage("Seven.")]), cache=InMemoryCache())
    for _ in range(2):
        model.invoke("How many mugs?")

    found = [attributes(span).get("agl.response.cached") for span in named(instrumented.get_finished_spans(), "chat")]
    assert found == [None, True]


@pytest.mark.parametrize(
    ("metadata", "calls", "reason"),
    [
        ({"status": "completed"}, [], "stop"),
        ({"status": "completed"}, [{"name": "stock", "args": {}, "id": "c1"}], "tool_calls"),
        ({"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}, [], "length"),
        ({"status": "incomplete", "incomplete_details": {"reason": "content_filter"}}, [], "content_filter"),
    ],
)
def test_an_answer_of_the_responses_api_has_a_finish_reason(
    instrumented: InMemorySpanExporter, metadata: dict[str, object], calls: list[ToolCall], reason: str
) -> None:
    answer = AIMessage("Seven.", response_metadata=metadata, tool_calls=calls)
    GenericFakeChatModel(messages=iter([answer])).invoke("How many mugs?")

    span = only(instrumented.get_finished_spans(), "chat")
    assert attributes(span)["gen_ai.response.finish_reasons"] == (reason,)
