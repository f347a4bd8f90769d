"""The `chat` span: exact attributes, whole and streamed, for every model client."""

import asyncio
import base64
import hashlib
import json
import random
import struct
from collections.abc import AsyncGenerator
from typing import Any

import PIL.Image
import pytest
from autogen_core import CancellationToken, FunctionCall, Image, InMemoryStore
from autogen_core.models import (
    AssistantMessage,
    CreateResult,
    FunctionExecutionResult,
    FunctionExecutionResultMessage,
    LLMMessage,
    RequestUsage,
    SystemMessage,
    UserMessage,
)
from autogen_core.tools import FunctionTool
from autogen_ext.models.cache import ChatCompletionCache
from autogen_ext.models.openai import BaseOpenAIChatCompletionClient
from autogen_ext.models.replay import ReplayChatCompletionClient
from openai import AsyncOpenAI, BadRequestError
from opentelemetry import trace
from opentelemetry.trace import SpanKind

import agl
from agl.content.filter import content_json
from tests.autogen.conftest import MODEL_INFO
from tests.autogen.scripted import says
from tests.autogen.span_tree import attributes, named, only, tree
from tests.stepped_clock import step_back
from tests.vllm_server import LOGPROBS, PROMPT_IDS, TOKEN_IDS

ASK: list[LLMMessage] = [SystemMessage(content="Be brief."), UserMessage(content="How many mugs?", source="user")]
TEXT = "Seven mugs TERMINATE"


async def stock(item: str) -> str:
    """Number of items in stock."""
    return f"7 x {item}"


STOCK = FunctionTool(stock, description="Number of items in stock.")


async def ask(client: Any, messages: list[LLMMessage], *, stream: bool, **options: Any) -> CreateResult:
    if not stream:
        return await client.create(messages, **options)
    result = None
    async for item in client.create_stream(messages, **options):
        result = item
    assert isinstance(result, CreateResult)
    return result


async def test_calls_keep_their_order_when_the_clock_steps_back(spans, client, server, monkeypatch):
    step_back(monkeypatch)
    for _ in range(2):
        await ask(client("planner"), ASK, stream=False)
    times = [
        moment
        for span in named(spans.get_finished_spans(), "chat planner")
        for moment in (span.start_time, span.end_time)
    ]
    assert times == sorted(times) and len(times) == 4


@pytest.mark.parametrize("stream", [False, True])
async def test_a_text_answer(spans, client, server, stream):
    made = client("planner", temperature=0.5, max_tokens=20)
    options = {"include_usage": True} if stream else {}
    await ask(made, ASK, stream=stream, **options)

    span = only(spans.get_finished_spans(), "chat planner")
    assert span.kind is SpanKind.CLIENT
    assert span.status.is_unset
    assert span.instrumentation_scope.name == "agl_autogen"
    assert attributes(span) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": "planner",
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.max_tokens": 20,
        "gen_ai.input.messages": content_json(
            [
                {"role": "system", "parts": [{"type": "text", "content": "Be brief."}]},
                {"role": "user", "parts": [{"type": "text", "content": "How many mugs?"}]},
            ]
        ),
        "gen_ai.output.messages": content_json(
            [{"role": "assistant", "parts": [{"type": "text", "content": TEXT}], "finish_reason": "stop"}]
        ),
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.response.id": "chatcmpl-0",
        "gen_ai.response.model": "planner",
        "gen_ai.usage.input_tokens": 11,
        "gen_ai.usage.output_tokens": 3,
    }


@pytest.mark.parametrize("stream", [False, True])
async def test_a_tool_call(spans, client, stream):
    await ask(client("executor"), ASK, stream=stream, tools=[STOCK])

    span = attributes(only(spans.get_finished_spans(), "chat executor"))
    assert span["gen_ai.response.finish_reasons"] == ("tool_calls",)
    assert json.loads(str(span["gen_ai.output.messages"])) == [
        {
            "role": "assistant",
            "parts": [{"type": "tool_call", "id": "call_1", "name": "stock", "arguments": {"item": "mug"}}],
            "finish_reason": "tool_calls",
        }
    ]
    (tool,) = json.loads(str(span["gen_ai.tool.definitions"]))
    assert (tool["type"], tool["name"], tool["description"]) == ("function", "stock", "Number of items in stock.")
    assert tool["parameters"]["required"] == ["item"]


async def test_a_stream_without_usage_has_no_usage_attributes(spans, client):
    await ask(client("planner"), ASK, stream=True)
    assert "gen_ai.usage.input_tokens" not in attributes(only(spans.get_finished_spans(), "chat planner"))


@pytest.mark.parametrize("stream", [False, True])
async def test_token_ids_of_the_server_are_packed(spans, client, stream):
    extra = {"extra_body": {"return_token_ids": True}, "logprobs": True}
    await ask(client("planner"), ASK, stream=stream, extra_create_args=extra)

    span = attributes(only(spans.get_finished_spans(), "chat planner"))
    assert span["agl.prompt.token_ids"] == struct.pack("<3i", *PROMPT_IDS)
    assert span["agl.response.token_ids"] == struct.pack("<3i", *TOKEN_IDS)
    assert span["agl.response.logprobs"] == struct.pack("<3f", *LOGPROBS)


async def test_a_whole_conversation_is_recorded_in_parts(spans):
    call = FunctionCall(id="c1", name="stock", arguments='{"item": "mug"}')
    broken = FunctionCall(id="c2", name="stock", arguments="{item")
    result = FunctionExecutionResult(call_id="c1", name="stock", content="7")
    conversation: list[LLMMessage] = [
        UserMessage(content=["Look", Image.from_base64(PIXEL)], source="user"),
        AssistantMessage(content=[call, broken], thought="I look it up.", source="executor"),
        FunctionExecutionResultMessage(content=[result]),
        AssistantMessage(content="Seven.", thought="7 is seven", source="executor"),
    ]
    await ReplayChatCompletionClient(["yes"], model_info=MODEL_INFO).create(conversation)

    span = attributes(only(spans.get_finished_spans(), "chat"))
    image = {"type": "uri", "modality": "image", "uri": Image.from_base64(PIXEL).data_uri}
    assert json.loads(str(span["gen_ai.input.messages"])) == [
        {
            "role": "user",
            "parts": [{"type": "text", "content": "Look"}, image],
        },
        {
            "role": "assistant",
            "parts": [
                {"type": "text", "content": "I look it up."},
                {"type": "tool_call", "id": "c1", "name": "stock", "arguments": {"item": "mug"}},
                {"type": "tool_call", "id": "c2", "name": "stock", "arguments": "{item"},
            ],
        },
        {"role": "tool", "parts": [{"type": "tool_call_response", "id": "c1", "response": "7"}]},
        {
            "role": "assistant",
            "parts": [{"type": "reasoning", "content": "7 is seven"}, {"type": "text", "content": "Seven."}],
        },
    ]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_other_than_openais_has_a_chat_span(spans, stream):
    await ask(ReplayChatCompletionClient(["yes"], model_info=MODEL_INFO), ASK, stream=stream)
    span = attributes(only(spans.get_finished_spans(), "chat"))
    assert span["gen_ai.provider.name"] == "replay"
    assert json.loads(str(span["gen_ai.output.messages"]))[0]["parts"] == [{"type": "text", "content": "yes"}]


class Traced(ReplayChatCompletionClient):
    """A client that makes a span, like an instrumented HTTP library."""

    async def create(self, *args: Any, **options: Any) -> CreateResult:
        with trace.get_tracer("user").start_as_current_span("POST"):
            return await super().create(*args, **options)

    async def create_stream(self, *args: Any, **options: Any) -> AsyncGenerator[str | CreateResult, None]:
        with trace.get_tracer("user").start_as_current_span("POST"):
            async for item in super().create_stream(*args, **options):
                yield item


@pytest.mark.parametrize("stream", [False, True])
async def test_a_span_of_the_http_library_is_a_child_of_the_chat_span(spans, stream):
    await ask(Traced(["yes"], model_info=MODEL_INFO), ASK, stream=stream)
    assert tree(spans.get_finished_spans()).splitlines() == ["chat", "  POST"]


async def test_a_client_class_defined_later_has_one_span_for_its_own_and_its_parents_create(spans):
    class Shouting(ReplayChatCompletionClient):
        async def create(self, messages: Any, **options: Any) -> CreateResult:
            result = await super().create(messages, **options)
            return result.model_copy(update={"content": str(result.content).upper()})

    await Shouting(["yes"], model_info=MODEL_INFO).create(ASK)
    span = attributes(only(spans.get_finished_spans(), "chat"))
    assert json.loads(str(span["gen_ai.output.messages"]))[0]["parts"][0]["content"] == "YES"


async def test_a_cache_before_a_client_is_one_call(spans, client, server):
    cached = ChatCompletionCache(client("planner"), InMemoryStore())
    await cached.create(ASK)
    span = attributes(only(spans.get_finished_spans(), "chat"))
    assert span["gen_ai.response.id"] == "chatcmpl-0"
    spans.clear()

    assert (await cached.create(ASK)).cached
    assert "gen_ai.response.id" not in attributes(only(spans.get_finished_spans(), "chat"))
    assert len(server.seen) == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_an_error_of_the_server_is_raised_unchanged_and_marks_the_span(spans, client, stream):
    with pytest.raises(BadRequestError):
        await ask(client("planner"), [UserMessage(content="FAIL", source="user")], stream=stream)
    span = only(spans.get_finished_spans(), "chat planner")
    assert span.status.status_code.name == "ERROR"
    assert attributes(span)["error.type"] == "BadRequestError"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_cancelled_call_ends_its_span(spans, client, stream):
    token = CancellationToken()
    slow: list[LLMMessage] = [UserMessage(content="SLOW", source="user")]
    call = asyncio.ensure_future(ask(client("planner"), slow, stream=stream, cancellation_token=token))
    await asyncio.sleep(0.05)
    token.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    span = only(spans.get_finished_spans(), "chat planner")
    assert (span.status.status_code.name, attributes(span)["error.type"]) == ("ERROR", "CancelledError")


async def test_headers_of_the_user_stay(spans, server):
    options = {"model": "planner", "extra_headers": {"x-own": "1"}}
    async with AsyncOpenAI(base_url=server.base_url, api_key="none") as connection:
        await BaseOpenAIChatCompletionClient(connection, create_args=options, model_info=MODEL_INFO).create(ASK)
    assert server.seen[0].headers["x-own"] == "1"
    assert "traceparent" in server.seen[0].headers


async def test_a_request_whose_description_fails_is_still_made(spans, caplog):
    class Unreadable(FunctionTool):
        @property
        def schema(self) -> Any:
            raise KeyError("no schema today")

    tool = Unreadable(stock, description="")
    result = await ReplayChatCompletionClient(["yes"], model_info=MODEL_INFO).create(ASK, tools=[tool])

    assert result.content == "yes"
    assert "a model request is not on its span" in caplog.text
    span = attributes(only(spans.get_finished_spans(), "chat"))
    assert span["gen_ai.response.finish_reasons"] == ("stop",)


async def test_the_function_calls_of_autogen_are_tool_calls(spans):
    call = FunctionCall(id="c1", name="stock", arguments="{}")
    usage = RequestUsage(prompt_tokens=1, completion_tokens=1)
    answer = CreateResult(finish_reason="function_calls", content=[call], usage=usage, cached=False)
    await ReplayChatCompletionClient([answer], model_info=MODEL_INFO).create(ASK)
    span = attributes(only(spans.get_finished_spans(), "chat"))
    assert span["gen_ai.response.finish_reasons"] == ("tool_calls",)


PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="


async def test_text_that_utf8_cannot_encode_is_escaped(spans):
    half = "\ud83d"  # half of an emoji, as a truncated response can contain
    await says("Seven.").create([UserMessage(content=f"How many {half}?", source="user")])
    recorded = str(attributes(only(spans.get_finished_spans(), "chat"))["gen_ai.input.messages"])
    assert recorded.isascii()
    assert json.loads(recorded)[0]["parts"][0]["content"] == f"How many {half}?"


async def test_a_large_image_is_on_one_span_of_a_rollout_only(spans):
    image = Image.from_pil(PIL.Image.frombytes("RGB", (64, 64), random.Random(0).randbytes(64 * 64 * 3)))
    client = ReplayChatCompletionClient(["yes", "no"], model_info=MODEL_INFO)
    with agl.rollout("picture"):
        for _ in range(2):
            await client.create([UserMessage(content=[image], source="user")])

    found = [attributes(span) for span in named(spans.get_finished_spans(), "chat")]
    data = base64.b64decode(image.to_base64())
    digest = hashlib.sha256(data).hexdigest()
    uri = f"media:image/png;bytes={len(data)};sha256={digest}"
    assert [json.loads(str(one["gen_ai.input.messages"]))[0]["parts"][0]["uri"] for one in found] == [uri, uri]
    assert [one.get(f"agl.media.{digest}") for one in found] == [data, None]
