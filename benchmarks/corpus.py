"""Deterministic OTLP/HTTP request bodies with the spans of agents that call tools, built before any clock starts.

A trace has 8 spans: one agent, 4 chats with their messages, 2 tools and a reward. In the corpus `tokens`, chats also
carry token ids and logprobs: 2.75 KB per span on average, compared with 1.3 KB in `light`.
"""

import itertools
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, Final, Literal

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, ArrayValue, InstrumentationScope, KeyValue
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans, Span

Corpus = Literal["tokens", "light"]
Body = tuple[int, bytes]
"""Number of spans, and the serialized request."""

SPANS_PER_TRACE: Final = 8
_DISTINCT_TRACES: Final = 320
"""After so many traces their contents repeat with new ids."""
_BEGIN_NS: Final = 1_795_000_000_000_000_000
_WORDS: Final = ("agent", "tool", "result", "order", "refund", "table", "column", "price", "weather", "patch")
ANYONE: Final = ({"service.name": "benchmark"},)


def bodies(
    corpus: Corpus, spans: int, batch: int, resources: Sequence[Mapping[str, str]] = ANYONE, *, first: int = 0
) -> Iterator[Body]:
    """`spans` spans, starting at number `first`, in requests of `batch` spans. Traces take the `resources` in turn.

    Raises ValueError if a batch is so large that it would contain the same trace object twice.
    """
    if batch > _DISTINCT_TRACES * SPANS_PER_TRACE:
        raise ValueError(f"batch is {batch} spans, expected at most {_DISTINCT_TRACES * SPANS_PER_TRACE}")
    traces = range(first // SPANS_PER_TRACE, (first + spans) // SPANS_PER_TRACE)
    ordered = ((span, number % len(resources)) for number in traces for span in _trace(corpus, number))
    for pairs in _chunks(ordered, batch):
        request = ExportTraceServiceRequest()
        for of, members in itertools.groupby(pairs, key=lambda pair: pair[1]):
            scope = ScopeSpans(scope=InstrumentationScope(name="benchmark"), spans=[span for span, _ in members])
            heading = Resource(attributes=[_pair(key, value) for key, value in resources[of].items()])
            request.resource_spans.append(ResourceSpans(resource=heading, scope_spans=[scope]))
        yield len(pairs), request.SerializeToString()


def _chunks(pairs: Iterator[tuple[Span, int]], size: int) -> Iterator[list[tuple[Span, int]]]:
    while chunk := list(itertools.islice(pairs, size)):
        yield chunk


def _trace(corpus: Corpus, number: int) -> list[Span]:
    """Reuses and changes the cached spans in place, so the caller must serialize them before the contents repeat."""
    spans = _distinct_trace(corpus, number % _DISTINCT_TRACES)
    ids = random.Random(number).randbytes(16 + 8 * SPANS_PER_TRACE)
    for place, span in enumerate(spans):
        span.trace_id, span.span_id = ids[:16], ids[16 + 8 * place : 24 + 8 * place]
        span.parent_span_id = ids[16:24] if place else b""
    return spans


@cache
def _distinct_trace(corpus: Corpus, number: int) -> list[Span]:
    draw = random.Random(f"{corpus} {number}")
    begin_ns = _BEGIN_NS + number * 10**10
    root = _span("invoke_agent solver", begin_ns, {"gen_ai.agent.name": "solver", "task.index": number})
    chats = [_span("chat", begin_ns + 10**9 * n, _chat(draw, corpus)) for n in range(4)]
    tools = [_span("execute_tool search", begin_ns + 10**9 * n, _tool(draw)) for n in range(2)]
    reward = {"reward.name": "primary", "reward.value": draw.random()}
    return [root, *chats, *tools, _span("reward", begin_ns + 9 * 10**9, reward)]


def _chat(draw: random.Random, corpus: Corpus) -> dict[str, Any]:
    prompt = [{"role": role, "content": _text(draw, 570)} for role in ("system", "user", "tool")]
    attributes: dict[str, Any] = {
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "example/agent-8b-instruct",
        "gen_ai.response.id": f"chatcmpl-{draw.getrandbits(96):024x}",
        "gen_ai.usage.input_tokens": 300,
        "gen_ai.usage.output_tokens": 60,
        "gen_ai.input.messages": json.dumps(prompt),
        "gen_ai.output.messages": json.dumps([{"role": "assistant", "content": _text(draw, 210)}]),
    }
    if corpus == "tokens":
        attributes["prompt_token_ids"] = [draw.randrange(150_000) for _ in range(300)]
        attributes["response_token_ids"] = [draw.randrange(150_000) for _ in range(60)]
        attributes["logprobs"] = [-draw.expovariate(2.0) for _ in range(60)]
    return attributes


def _tool(draw: random.Random) -> dict[str, Any]:
    return {"gen_ai.tool.name": "search", "gen_ai.tool.call.arguments": _text(draw, 80), "result": _text(draw, 150)}


def _text(draw: random.Random, size: int) -> str:
    return " ".join(draw.choices(_WORDS, k=size // 4))[:size]


def _span(name: str, start_ns: int, attributes: Mapping[str, Any]) -> Span:
    return Span(
        name=name,
        start_time_unix_nano=start_ns,
        end_time_unix_nano=start_ns + 10**9,
        attributes=[_pair(key, value) for key, value in attributes.items()],
    )


def _pair(key: str, value: Any) -> KeyValue:
    return KeyValue(key=key, value=_value(value))


def _value(value: Any) -> AnyValue:
    if isinstance(value, list):
        return AnyValue(array_value=ArrayValue(values=[_value(item) for item in value]))
    kind = {str: "string_value", int: "int_value", float: "double_value"}[type(value)]
    return AnyValue(**{kind: value})
