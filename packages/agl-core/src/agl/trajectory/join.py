"""Relations between the spans of a rollout: parents, and the two spans of one model request.

The gateway's span of a request has the tokens, the framework's span has the role; `join_calls` joins them.
A gateway span belongs to the nearest chat span above it, since the plug-ins send `traceparent` with each request; if
there is none, to the first chat span with the same response id, unless several requests were answered with that id:
engines make it of an X-Request-Id, which a client may repeat. A request with several prompts belongs to the chat spans
of these prompts. Either of the two spans may be missing.

`in_one_clock` corrects clock skew between the processes of a rollout, since the order of its spans decides how they
train. Spans of one process are in the order of its clock. Spans of two processes bound the offset between their clocks:
a span does not start before the span that caused it, and the server's side of a request, such as a gateway call, ends
before the client's. All times of a process are shifted by the one offset nearest to 0 within its bounds, so the order
within a process is kept.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from agl import semconv
from agl.span import AttributeValue, Span
from agl.trajectory.attributes import parse_json, read_number, read_object

_CHAT_OPERATIONS = {semconv.OPERATION_CHAT, semconv.OPERATION_TEXT_COMPLETION}
_REQUEST_TYPES = {"chat", "completion"}
"""Values of `llm.request.type`, which OpenLLMetry wrote before it adopted the standard's operation names."""

Process = tuple[AttributeValue | None, ...]
"""Resource attributes that identify a process. Gateway spans have none, so all gateways count as one process."""

_SERVER_KIND = 2
_PROCESS_ATTRIBUTES = ("service.name", "service.instance.id", "host.name")


class SpanTree:
    """The spans of a rollout by parent. A span whose parent is missing is a root."""

    def __init__(self, spans: Iterable[Span]) -> None:
        self._by_key: dict[tuple[str, str], Span] = {}
        for span in spans:
            self._by_key.setdefault(_key(span), span)
        self.spans = sorted(self._by_key.values(), key=lambda span: span.start_ns)
        """Every span once, by start time; spans with equal times are in the order given."""
        self.ambiguous_responses = _ambiguous_responses(filter(_is_gateway_call, self.spans))
        """Response ids that identify no call, because several requests were answered with them."""

    def parent(self, span: Span) -> Span | None:
        return self._by_key.get((span.trace_id, span.parent_id)) if span.parent_id else None

    def ancestors(self, span: Span) -> Iterator[Span]:
        """Parents of `span`, the nearest first; a cycle of parents ends where it would repeat."""
        seen = {_key(span)}
        above = self.parent(span)
        while above is not None and _key(above) not in seen:
            yield above
            seen.add(_key(above))
            above = self.parent(above)


@dataclass(frozen=True, slots=True)
class CallSpans:
    """The spans of one model request; at least one of the two is present."""

    gateway: Span | None
    chat: Span | None
    """The framework's span."""

    @property
    def spans(self) -> tuple[Span, ...]:
        """The spans that are present, the gateway's first."""
        return tuple(span for span in (self.gateway, self.chat) if span is not None)

    @property
    def choice(self) -> int:
        return max(int(read_number(self.spans[0], semconv.GATEWAY_CHOICE) or 0), 0)

    @property
    def order(self) -> tuple[int, int, int, str]:
        """Sort key: time by the agent's clock if its span is present, as for rewards and hand-offs."""
        first, last = self.spans[0], self.spans[-1]
        return last.start_ns, first.start_ns, self.choice, first.span_id


def join_calls(tree: SpanTree) -> list[CallSpans]:
    """The spans of each model request in `tree`, in order of time."""
    chats = _one_for_each_request(tree, _innermost_chats(tree))
    by_response = {answer: chat for chat in reversed(chats) if (answer := chat.response_id)}
    for response_id in tree.ambiguous_responses:
        by_response.pop(response_id, None)
    gateway = filter(_is_gateway_call, tree.spans)
    calls = [CallSpans(span, _chat_above(tree, span) or by_response.get(span.response_id or "")) for span in gateway]
    joined = {id(call.chat) for call in calls}
    calls = _joined_by_prompt(calls, [chat for chat in chats if id(chat) not in joined])
    joined = {id(call.chat) for call in calls}
    calls += [CallSpans(None, chat) for chat in chats if id(chat) not in joined]
    return sorted(calls, key=lambda call: call.order)


def _joined_by_prompt(calls: list[CallSpans], alone: Sequence[Span]) -> list[CallSpans]:
    """`calls`, of which those of a request with several prompts are joined with the chat spans of these in `alone`.

    LangChain opens a span for each prompt, and the request is beside them, below the same parent. A prompt belongs to
    the first span that has its text; all its choices share that span.
    """
    free: dict[tuple[str, str | None, str], list[Span]] = {}
    for chat in alone:
        if text := _text_of_prompt(chat):
            free.setdefault((chat.trace_id, chat.parent_id, text), []).append(chat)
    of_prompt: dict[tuple[str, str | None, int, int], Span | None] = {}
    joined: list[CallSpans] = []
    for call in calls:
        span = call.gateway
        if free and span and call.chat is None and (prompt := _answered_prompt(span, call.choice)):
            number, text = prompt
            beside = free.get((span.trace_id, span.parent_id, text))
            key = span.trace_id, span.parent_id, span.start_ns, number
            if key not in of_prompt:
                of_prompt[key] = beside.pop(0) if beside else None
            call = replace(call, chat=of_prompt[key])
        joined.append(call)
    return joined


def _text_of_prompt(chat: Span) -> str | None:
    """The prompt of a framework's text completion, if its content was recorded."""
    if chat.text(semconv.GEN_AI_OPERATION_NAME) != semconv.OPERATION_TEXT_COMPLETION:
        return None
    try:
        content = parse_json(chat.text(semconv.GEN_AI_INPUT_MESSAGES) or "null")[0]["parts"][0]["content"]
    except (ValueError, TypeError, LookupError):
        return None
    return content if isinstance(content, str) else None


def _answered_prompt(span: Span, choice: int) -> tuple[int, str] | None:
    """Number and text of the prompt that a choice of a request with several prompts answers."""
    request = read_object(span, semconv.GATEWAY_REQUEST)
    prompts, n = request.get("prompt"), request.get("n") or 1
    if not isinstance(prompts, list) or len(prompts) < 2 or not isinstance(n, int):
        return None
    if not 0 <= choice // n < len(prompts):
        return None
    text = prompts[choice // n]
    return (choice // n, text) if isinstance(text, str) else None


def causes(spans: Iterable[Span]) -> Iterator[tuple[Span, Span]]:
    """Pairs of cause and span. The cause is the parent or, for a gateway span without one, the joined chat span."""
    tree = SpanTree(spans)
    chats = {id(call.gateway): call.chat for call in join_calls(tree)}
    for span in tree.spans:
        if cause := tree.parent(span) or chats.get(id(span)):
            yield cause, span


def _key(span: Span) -> tuple[str, str]:
    return span.trace_id, span.span_id


def _ambiguous_responses(gateway_calls: Iterable[Span]) -> set[str]:
    requests: dict[str, set[tuple[str, str | None, int]]] = {}
    for span in gateway_calls:
        if response_id := span.response_id:  # The choices of one request have trace, parent and start in common.
            requests.setdefault(response_id, set()).add((span.trace_id, span.parent_id, span.start_ns))
    return {response_id for response_id, found in requests.items() if len(found) > 1}


def _innermost_chats(tree: SpanTree) -> list[Span]:
    """Framework spans of requests. A chat span around another is an outer view of the same request; one below a
    gateway span is the engine's view of it."""
    chats = [span for span in tree.spans if _is_chat(span) and not any(map(_is_gateway_call, tree.ancestors(span)))]
    outer = {id(above) for chat in chats for above in tree.ancestors(chat)}
    return [chat for chat in chats if id(chat) not in outer]


def _one_for_each_request(tree: SpanTree, chats: Sequence[Span]) -> list[Span]:
    """`chats` without those of a second instrumentor: of the same response and time, but not of the same scope.

    The span that a gateway call names as its parent stays, else the one with a role. An answer from a cache is no
    second view: it is given after the first one has ended.
    """
    linked = {id(_chat_above(tree, span)) for span in tree.spans if _is_gateway_call(span)}
    kept: dict[tuple[str, float], list[Span]] = {}
    views: set[int] = set()
    for chat in sorted(chats, key=lambda chat: (id(chat) not in linked, chat.role is None)):
        if chat.response_id is None or chat.response_id in tree.ambiguous_responses:
            continue
        others = kept.setdefault((chat.response_id, read_number(chat, semconv.GATEWAY_CHOICE) or 0), [])
        if any(other.scope != chat.scope and _overlap(other, chat) for other in others):
            views.add(id(chat))
        others.append(chat)
    return [chat for chat in chats if id(chat) not in views]


def _overlap(one: Span, other: Span) -> bool:
    return one.start_ns < other.end_ns and other.start_ns < one.end_ns


def _chat_above(tree: SpanTree, span: Span) -> Span | None:
    return next((above for above in tree.ancestors(span) if _is_chat(above)), None)


def _is_gateway_call(span: Span) -> bool:
    return span.name == semconv.SPAN_GATEWAY_CALL


def _is_chat(span: Span) -> bool:
    return not _is_gateway_call(span) and (
        span.text(semconv.GEN_AI_OPERATION_NAME) in _CHAT_OPERATIONS
        or span.text("openinference.span.kind") == "LLM"
        or span.text("llm.request.type") in _REQUEST_TYPES
        or span.name == "openai.chat.completion"  # agentlightning's
    )


@dataclass(slots=True)
class _Bounds:
    """Bounds on the offset, in ns, from one process's clock to another's."""

    lower: float = -math.inf
    upper: float = math.inf

    @property
    def nearest_to_zero(self) -> int:
        """The offset nearest to 0 within the bounds; if they conflict, the lower one wins."""
        return int(max(self.lower, min(self.upper, 0)))

    def tighten(self, cause: Span, effect: Span) -> None:
        self.lower = max(self.lower, cause.start_ns - effect.start_ns)
        if effect.kind == _SERVER_KIND or effect.name == semconv.SPAN_GATEWAY_CALL:
            self.upper = min(self.upper, cause.end_ns - effect.end_ns)


def in_one_clock(spans: Sequence[Span]) -> list[Span]:
    """`spans` with all times on the clock of the process that started the rollout."""
    if len({_process(span) for span in spans}) < 2:
        return list(spans)
    edges = list(causes(spans))
    offsets = _offsets(edges, _first_process(spans, edges))
    return [_shifted(span, offsets.get(_process(span), 0)) for span in spans]


def _first_process(spans: Sequence[Span], edges: Sequence[tuple[Span, Span]]) -> Process:
    """The process of the rollout's own span, else of the first span that no other span caused."""
    caused = {id(effect) for _, effect in edges}
    roots = [span for span in spans if id(span) not in caused] or list(spans)
    return _process(next((span for span in roots if span.name == semconv.SPAN_ROLLOUT), roots[0]))


def _offsets(edges: Sequence[tuple[Span, Span]], first: Process) -> dict[Process, int]:
    """Nanoseconds to add to the times of each process that a chain of causes links to `first`."""
    bounds: dict[tuple[Process, Process], _Bounds] = {}
    for cause, effect in edges:
        pair = _process(cause), _process(effect)
        if pair[0] != pair[1]:
            bounds.setdefault(pair, _Bounds()).tighten(cause, effect)
    offsets, reached = {first: 0}, [first]
    for process in reached:
        for (cause, effect), bound in bounds.items():
            if cause == process and effect not in offsets:
                offsets[effect] = offsets[process] + bound.nearest_to_zero
                reached.append(effect)
    return offsets


def _shifted(span: Span, by_ns: int) -> Span:
    return replace(span, start_ns=span.start_ns + by_ns, end_ns=span.end_ns + by_ns) if by_ns else span


def _process(span: Span) -> Process:
    return tuple(span.resource.get(name) for name in _PROCESS_ATTRIBUTES)
