"""One model request, put together from the spans that tell of it.

The gateway's span knows the tokens, the framework's `chat` span knows who asked. They are joined by parentage (our
plugins send `traceparent`), else by the response id. Either may be missing.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from agl import semconv
from agl.span import Span
from agl.tokens.drift import Drifted
from agl.trajectory.agent import agent_of
from agl.trajectory.aliases import read, read_ids, read_logprobs, read_number, read_text, read_texts
from agl.trajectory.reward import Reward, collect_rewards, rewards_by_target
from agl.trajectory.tree import SpanTree

UNNAMED_ROLE = "default"
"""Role of a call of which no span names a role, an agent, a policy or a model."""

_CHAT_OPERATIONS = {semconv.OPERATION_CHAT, semconv.OPERATION_TEXT_COMPLETION}
_REQUEST_TYPES = {"chat", "completion"}
"""Of OpenLLMetry before it took over the standard's operation names."""


@dataclass(frozen=True, slots=True)
class Call:
    """A model request and its answer: one choice of it, where the request asked for several."""

    rollout_id: str
    attempt_id: str | None
    role: str
    trace_id: str
    span_id: str
    """The gateway's span, else the framework's: unlike the other ids it names this call alone."""
    chat_span_id: str | None
    """The framework's span. Shared by the choices, and by the tries, of one request."""
    response_id: str | None
    choice: int
    prompt_ids: list[int] | None
    response_ids: list[int] | None
    logprobs: list[float] | None
    """One for each response token, as sampled."""
    input_tokens: int | None
    output_tokens: int | None
    """Counts: of the ids where they are there, else as the engine states them."""
    malformed: str | None
    """What is wrong with ids or logprobs that are there but cannot be read."""
    policy_version: str | None
    temperature: float | None
    """As asked of the engine; 0 is greedy."""
    start_ns: int
    finish_reason: str | None
    error: str | None
    rewards: tuple[Reward, ...]
    """Those that target this call."""
    drifted: Drifted | None = None
    """How its prompt differs from the tokens of the call before it, as the gateway saw it."""
    prefix: str | None = None
    """`exact` where the gateway made the prompt of the tokens it held; else why it could not, if it was asked to."""

    @property
    def through_gateway(self) -> bool:
        return self.span_id != self.chat_span_id


def collect_calls(spans: Iterable[Span], rollout_id: str) -> list[Call]:
    """Every model request that the spans of a rollout tell of, by start time; also failed ones and ones without ids."""
    tree = SpanTree(spans)
    targeted = rewards_by_target(collect_rewards(tree.spans))
    requests = sorted(_requests(tree), key=lambda request: request.moment)
    return [_to_call(tree, request, rollout_id, targeted) for request in requests]


def say_error(span: Span) -> str:
    """Type and message of what went wrong in `span`."""
    kind, message = span.text(semconv.ERROR_TYPE), span.status_message
    if not kind or kind in message:
        return message or kind or "status error without a message"
    return f"{kind}: {message}" if message else kind


@dataclass(frozen=True, slots=True)
class _Request:
    """The spans of one call."""

    spans: tuple[Span, ...]
    """The gateway's, then the framework's; at least one of them."""

    @property
    def gateway(self) -> Span | None:
        return self.spans[0] if _is_gateway_call(self.spans[0]) else None

    @property
    def chat(self) -> Span | None:
        return None if _is_gateway_call(self.spans[-1]) else self.spans[-1]

    @property
    def choice(self) -> int:
        return int(read_number(self.spans[0], semconv.GATEWAY_CHOICE) or 0)

    @property
    def moment(self) -> tuple[int, int, int, str]:
        """Where it stands in time: by the agent's clock where there is one, as rewards and hand-offs are."""
        return self.spans[-1].start_ns, self.spans[0].start_ns, self.choice, self.spans[0].span_id


def _requests(tree: SpanTree) -> list[_Request]:
    gateways = [span for span in tree.spans if _is_gateway_call(span)]
    chats = _innermost_chats(tree)
    by_response: dict[str, Span] = {}
    for chat in chats:
        if response_id := chat.response_id:
            by_response.setdefault(response_id, chat)
    joined = [(span, _chat_of(span, tree, by_response)) for span in gateways]
    asked = {id(chat) for _, chat in joined}
    return [_Request((gateway, chat) if chat else (gateway,)) for gateway, chat in joined] + [
        _Request((chat,)) for chat in chats if id(chat) not in asked
    ]


def _innermost_chats(tree: SpanTree) -> list[Span]:
    """Framework spans of a request. One around another tells of the same request, as seen from further out.

    One below the gateway's is the engine's own account of it.
    """
    chats = [span for span in tree.spans if _is_chat(span) and not any(map(_is_gateway_call, tree.ancestors(span)))]
    outer = {id(above) for chat in chats for above in tree.ancestors(chat)}
    return [chat for chat in chats if id(chat) not in outer]


def _is_gateway_call(span: Span) -> bool:
    return span.name == semconv.SPAN_GATEWAY_CALL


def _is_chat(span: Span) -> bool:
    return not _is_gateway_call(span) and (
        span.text(semconv.GEN_AI_OPERATION_NAME) in _CHAT_OPERATIONS
        or span.text("openinference.span.kind") == "LLM"
        or span.text("llm.request.type") in _REQUEST_TYPES
        or span.name == "openai.chat.completion"  # agentlightning's
    )


def _chat_of(gateway: Span, tree: SpanTree, by_response: dict[str, Span]) -> Span | None:
    above = next((span for span in tree.ancestors(gateway) if _is_chat(span)), None)
    return above or by_response.get(gateway.response_id or "")


def _to_call(tree: SpanTree, request: _Request, rollout_id: str, targeted: dict[str, list[Reward]]) -> Call:
    spans, chat = request.spans, request.chat
    line = [*_line(tree, chat), *_line(tree, request.gateway)]
    version = _policy_version(spans)
    response_id = next((name for span in spans if (name := span.response_id)), None)
    names = dict.fromkeys([*(span.span_id for span in spans), response_id])
    tokens = _read_tokens(spans)
    return Call(
        rollout_id=rollout_id,
        attempt_id=next((name for span in line if (name := span.attempt_id)), None),
        role=_role(line) or _policy_name(version or _first_text(spans, semconv.GEN_AI_REQUEST_MODEL)),
        trace_id=spans[0].trace_id,
        span_id=spans[0].span_id,
        chat_span_id=chat.span_id if chat else None,
        response_id=response_id,
        choice=request.choice,
        prompt_ids=tokens.prompt_ids,
        response_ids=tokens.response_ids,
        logprobs=tokens.logprobs,
        input_tokens=_count(tokens.prompt_ids, spans, semconv.GEN_AI_USAGE_INPUT_TOKENS),
        output_tokens=_count(tokens.response_ids, spans, semconv.GEN_AI_USAGE_OUTPUT_TOKENS),
        malformed=tokens.malformed,
        policy_version=version,
        temperature=next(
            (t for span in spans if (t := read_number(span, semconv.GEN_AI_REQUEST_TEMPERATURE)) is not None), None
        ),
        start_ns=spans[-1].start_ns,
        finish_reason=_finish_reason(spans, request.choice),
        error=next((say_error(span) for span in spans if span.status == "error"), None),
        rewards=tuple(reward for name in names if name for reward in targeted.get(name, ())),
        drifted=Drifted.of_json(spans[0].text(semconv.GATEWAY_DRIFT) or ""),
        prefix=spans[0].text(semconv.GATEWAY_PREFIX),
    )


def _line(tree: SpanTree, span: Span | None) -> Iterator[Span]:
    """`span` and its ancestors, the nearest first."""
    if span is not None:
        yield span
        yield from tree.ancestors(span)


def _role(line: Sequence[Span]) -> str | None:
    """The framework's word, nearest to the call first; the gateway's only where the framework says nothing."""
    return next((name for span in line if (name := agent_of(span))), None)


def _policy_version(spans: Sequence[Span]) -> str | None:
    """As the gateway says it; without one, the name by which the engine answered, if it counts versions."""
    answered_by = _first_text(spans, semconv.GEN_AI_RESPONSE_MODEL) or ""
    return _first_text(spans, semconv.POLICY_VERSION) or (answered_by if "@" in answered_by else None)


def _policy_name(version: str | None) -> str:
    """`writer` of `writer@3`."""
    return (version or "").partition("@")[0] or UNNAMED_ROLE


class _Tokens(NamedTuple):
    prompt_ids: list[int] | None = None
    response_ids: list[int] | None = None
    logprobs: list[float] | None = None
    malformed: str | None = None


def _read_tokens(spans: Sequence[Span]) -> _Tokens:
    """Tokens of one span, the first that has ids: those of two are never mixed."""
    names = (semconv.RESPONSE_TOKEN_IDS, semconv.PROMPT_TOKEN_IDS)
    source = next((span for name in names for span in spans if read(span, name) is not None), None)
    if source is None:
        return _Tokens()
    try:
        return _Tokens(
            read_ids(source, semconv.PROMPT_TOKEN_IDS),
            read_ids(source, semconv.RESPONSE_TOKEN_IDS),
            read_logprobs(source, semconv.RESPONSE_LOGPROBS),
        )
    except (ValueError, TypeError, OverflowError) as error:
        return _Tokens(malformed=str(error))


def _first_text(spans: Iterable[Span], name: str) -> str | None:
    return next((text for span in spans if (text := read_text(span, name))), None)


def _count(ids: list[int] | None, spans: Sequence[Span], usage: str) -> int | None:
    if ids is not None:
        return len(ids)
    stated = next((number for span in spans if (number := read_number(span, usage)) is not None), None)
    return None if stated is None else int(stated)


def _finish_reason(spans: Sequence[Span], choice: int) -> str | None:
    """The gateway's spans hold the reason of their own choice, a framework's those of all."""
    for span in spans:
        if reasons := read_texts(span, semconv.GEN_AI_RESPONSE_FINISH_REASONS):
            return reasons[min(choice, len(reasons) - 1)]
    return None
