"""One model request, read from the gateway's and the framework's span of it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Final, NamedTuple

from agl import semconv
from agl.span import Span
from agl.tokens.drift import Drifted
from agl.tokens.packing import ID_BYTES, unpack_ids
from agl.trajectory.attributes import (
    agent_of,
    read,
    read_ids,
    read_logprobs,
    read_number,
    read_object,
    read_text,
    read_texts,
)
from agl.trajectory.join import CallSpans, SpanTree
from agl.trajectory.reward import Reward

UNNAMED_ROLE = "default"
"""Role of a call whose spans name no role, agent, policy or model."""


_ENGINE_ERRORS: Final = ("engine_error", "engine_timeout")
"""Errors that the gateway also reports after the status of a stream was sent."""


class Branch(NamedTuple):
    """A span that calls are made in."""

    span_id: str
    start_ns: int


@dataclass(frozen=True, slots=True)
class Call:
    """A model request and its response. A request for several choices (`n`) is one call per choice."""

    rollout_id: str
    attempt_id: str | None
    role: str
    trace_id: str
    span_id: str
    """The gateway's span, else the framework's. The only id that is unique to this call."""
    chat_span_id: str | None
    """The framework's span. All choices and retries of one request share it."""
    response_id: str | None
    choice: int
    packed_prompt: bytes | None
    packed_response: bytes | None
    """Token ids, packed (see `agl.tokens.packing`)."""
    logprobs: list[float] | None
    """One per response token, as sampled."""
    input_tokens: int | None
    output_tokens: int | None
    """Number of token ids if there are ids, else the usage that the engine reported."""
    malformed: str | None
    """Why the token ids or logprobs cannot be used; None if they can."""
    miscounted: str | None
    """Why there are fewer or more token ids than the engine counted; None if the counts agree or it stated none."""
    policy_version: str | None
    temperature: float | None
    """As in the request to the engine; 0 is greedy."""
    seed: int | None
    """As in the request to the engine."""
    start_ns: int
    end_ns: int
    """By the clock of the agent, if the framework's span is present."""
    branches: tuple[Branch, ...]
    """The spans around the call, from the root to the call's own span."""
    finish_reason: str | None
    error: str | None
    engine_failed: bool
    """The engine failed it, or the gateway answered with a server error (5xx)."""
    rewards: tuple[Reward, ...]
    """Those that target this call."""
    drifted: Drifted | None = None
    """How its prompt differs from the previous call's tokens, as recorded by the gateway."""
    prefix: str | None = None
    """`exact` if the gateway built the prompt from the previous call's tokens; if it could not, the reason."""
    sampling: Mapping[str, float] = field(default_factory=dict)
    """Request fields that limited the distribution, as a training had declared them."""
    is_cached: bool = False
    """A cache in the agent answered."""
    constraints: tuple[str, ...] = ()
    """Request fields due to which the engine did not sample from the model's full distribution."""

    @property
    def through_gateway(self) -> bool:
        return self.span_id != self.chat_span_id

    @property
    def prompt_ids(self) -> list[int] | None:
        return None if self.packed_prompt is None else unpack_ids(self.packed_prompt)

    @property
    def response_ids(self) -> list[int] | None:
        return None if self.packed_response is None else unpack_ids(self.packed_response)


def is_engine_failure(span: Span) -> bool:
    """Whether `span` is a gateway call that ended with a server error (5xx), or in a stream with one of the engine."""
    if span.name != semconv.SPAN_GATEWAY_CALL or span.status != "error":
        return False
    status = span.number(semconv.HTTP_RESPONSE_STATUS_CODE)
    is_server_error = status is not None and status >= HTTPStatus.INTERNAL_SERVER_ERROR
    return is_server_error or span.text(semconv.ERROR_TYPE) in _ENGINE_ERRORS


def error_of(span: Span) -> str:
    """Type and message of the error that `span` recorded."""
    kind, message = span.text(semconv.ERROR_TYPE), span.status_message
    if not kind or kind in message:
        return message or kind or "status error without a message"
    return f"{kind}: {message}" if message else kind


def read_call(
    tree: SpanTree, joined: CallSpans, rollout_id: str, rewards_by_target: Mapping[str, Sequence[Reward]]
) -> Call:
    """The call of the spans in `joined`, which may have failed or lack token ids."""
    spans, chat = joined.spans, joined.chat
    lineage = [*_lineage(tree, chat), *_lineage(tree, joined.gateway)]
    version = _policy_version(spans)
    response_id = next((name for span in spans if (name := span.response_id)), None)
    named = [] if response_id in tree.ambiguous_responses else [response_id]
    targets = dict.fromkeys([*(span.span_id for span in spans), *named])
    tokens = _read_tokens(spans)
    own = spans[-1]
    return Call(
        rollout_id=rollout_id,
        attempt_id=next((name for span in lineage if (name := span.attempt_id)), None),
        role=_role(lineage) or _policy_name(version or _first_text(spans, semconv.GEN_AI_REQUEST_MODEL)),
        trace_id=spans[0].trace_id,
        span_id=spans[0].span_id,
        chat_span_id=chat.span_id if chat else None,
        response_id=response_id,
        choice=joined.choice,
        packed_prompt=tokens.prompt,
        packed_response=tokens.response,
        logprobs=tokens.logprobs,
        input_tokens=_count(tokens.prompt, spans, semconv.GEN_AI_USAGE_INPUT_TOKENS),
        output_tokens=_count(tokens.response, spans, semconv.GEN_AI_USAGE_OUTPUT_TOKENS),
        malformed=tokens.malformed,
        miscounted=tokens.miscounted,
        policy_version=version,
        temperature=_first_number(spans, semconv.GEN_AI_REQUEST_TEMPERATURE),
        seed=None if (seed := _first_number(spans, semconv.GEN_AI_REQUEST_SEED)) is None else int(seed),
        start_ns=own.start_ns,
        end_ns=own.end_ns,
        branches=tuple(Branch(span.span_id, span.start_ns) for span in reversed([*_lineage(tree, own)])),
        finish_reason=_finish_reason(spans, joined.choice),
        error=next((error_of(span) for span in spans if span.status == "error"), None),
        engine_failed=any(map(is_engine_failure, spans)),
        rewards=tuple(reward for target in targets if target for reward in rewards_by_target.get(target, ())),
        drifted=Drifted.of_json(drift) if (drift := spans[0].text(semconv.GATEWAY_DRIFT)) else None,
        prefix=spans[0].text(semconv.GATEWAY_PREFIX),
        sampling=read_object(spans[0], semconv.GATEWAY_SAMPLING),
        is_cached=any(span.attributes.get(semconv.RESPONSE_CACHED) is True for span in spans),
        constraints=tuple(read_texts(spans[0], semconv.GATEWAY_CONSTRAINTS)),
    )


def _lineage(tree: SpanTree, span: Span | None) -> Iterator[Span]:
    """`span` and its ancestors, the nearest first."""
    if span is not None:
        yield span
        yield from tree.ancestors(span)


def _role(lineage: Sequence[Span]) -> str | None:
    """The name on the span nearest to the call; framework spans come before the gateway's."""
    return next((name for span in lineage if (name := agent_of(span))), None)


def _policy_version(spans: Sequence[Span]) -> str | None:
    """The version that the gateway recorded, else the response's model name if it is a version (`writer@3`)."""
    answered_by = _first_text(spans, semconv.GEN_AI_RESPONSE_MODEL) or ""
    return _first_text(spans, semconv.POLICY_VERSION) or (answered_by if "@" in answered_by else None)


def _policy_name(version: str | None) -> str:
    """`writer` of `writer@3`."""
    return (version or "").partition("@")[0] or UNNAMED_ROLE


class _Tokens(NamedTuple):
    prompt: bytes | None = None
    response: bytes | None = None
    logprobs: list[float] | None = None
    malformed: str | None = None
    miscounted: str | None = None


def _read_tokens(spans: Sequence[Span]) -> _Tokens:
    """Tokens of the first span that has ids. Tokens of two spans are never combined."""
    if fault := _first_text(spans, semconv.TOKENS_FAULT):
        return _Tokens(malformed=fault)
    names = (semconv.RESPONSE_TOKEN_IDS, semconv.PROMPT_TOKEN_IDS)
    source = next((span for name in names for span in spans if read(span, name) is not None), None)
    if source is None:
        return _Tokens()
    try:
        prompt, response = (read_ids(source, name) for name in reversed(names))
        logprobs = read_logprobs(source, semconv.RESPONSE_LOGPROBS)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        return _Tokens(malformed=str(error))
    return _Tokens(prompt, response, logprobs, miscounted=_miscounted(source, prompt, response))


def _miscounted(source: Span, prompt: bytes | None, response: bytes | None) -> str | None:
    """How the number of ids differs from the engine's count on the same span.

    A framework's count is the sum over all choices, 0 if it knows none, and of the prompt perhaps its own.
    """
    if len(read_texts(source, semconv.GEN_AI_RESPONSE_FINISH_REASONS)) > 1:
        return None
    counted = [(response, semconv.GEN_AI_USAGE_OUTPUT_TOKENS, "response")]
    if source.name == semconv.SPAN_GATEWAY_CALL:
        counted.append((prompt, semconv.GEN_AI_USAGE_INPUT_TOKENS, "prompt"))
    for packed, usage, what in counted:
        stated = read_number(source, usage)
        if packed is not None and stated and stated != len(packed) // ID_BYTES:
            return f"the engine counted {stated:g} {what} tokens and returned {len(packed) // ID_BYTES} ids"
    return None


def _first_text(spans: Iterable[Span], name: str) -> str | None:
    return next((text for span in spans if (text := read_text(span, name))), None)


def _first_number(spans: Iterable[Span], name: str) -> float | None:
    return next((number for span in spans if (number := read_number(span, name)) is not None), None)


def _count(packed: bytes | None, spans: Sequence[Span], usage: str) -> int | None:
    if packed is not None:
        return len(packed) // ID_BYTES
    reported = _first_number(spans, usage)
    return None if reported is None else int(reported)


def _finish_reason(spans: Sequence[Span], choice: int) -> str | None:
    """A gateway span has the finish reason of its own choice, a framework span those of all choices."""
    for span in spans:
        if reasons := read_texts(span, semconv.GEN_AI_RESPONSE_FINISH_REASONS):
            return reasons[min(choice, len(reasons) - 1)]
    return None
