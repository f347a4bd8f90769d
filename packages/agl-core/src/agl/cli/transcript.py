"""The text of a rollout's spans: prompts and answers, tool calls with their results, and what emitters recorded."""

import textwrap
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from agl import semconv
from agl.cli.conversation import read_conversation, text_of
from agl.cli.terminal import counted, printable
from agl.span import Span
from agl.trajectory import Call

_MAX_CHARS: Final = 1200
_MAX_LINES: Final = 24
_LABEL_WIDTH: Final = 9

_LABELS: Final = {
    semconv.GEN_AI_TOOL_CALL_ARGUMENTS: "arguments",
    semconv.GEN_AI_TOOL_CALL_RESULT: "result",
    semconv.GEN_AI_RETRIEVAL_QUERY_TEXT: "query",
    semconv.GEN_AI_RETRIEVAL_DOCUMENTS: "documents",
    semconv.OBSERVATION_CONTENT: "observed",
    semconv.MESSAGE_BODY: "message",
    semconv.OBJECT_JSON: "object",
    semconv.OPERATION_INPUT: "input",
    semconv.OPERATION_OUTPUT: "output",
    "input.value": "input",  # OpenInference
    "output.value": "output",
    "traceloop.entity.input": "input",  # OpenLLMetry
    "traceloop.entity.output": "output",
}
"""Attributes with text, and their labels."""


class Said(NamedTuple):
    """A text and who or what said it."""

    label: str
    text: str


class Transcript:
    """The texts of each span of a rollout. A call's messages are at the gateway's span, if it has one."""

    def __init__(self, calls: Sequence[Call], spans: Sequence[Span]) -> None:
        by_id = {span.span_id: span for span in spans}
        self.conversations = {call.span_id: read_conversation(call, by_id) for call in calls}
        self._joined = {call.chat_span_id for call in calls if call.through_gateway}
        self._shown: list[list[Said]] = []
        """The conversations that `new_texts` has returned."""

    def own(self, span: Span) -> list[Said]:
        """Texts of `span` other than the messages of a call."""
        if span.span_id in self.conversations or span.span_id in self._joined:
            return []
        found = ((label, span.attributes.get(name)) for name, label in _LABELS.items())
        return [Said(label, value) for label, value in found if isinstance(value, str) and value]

    def new_texts(self, span: Span) -> list[Said]:
        """Texts of `span`; of a call, the messages with which no earlier call's conversation began as well."""
        conversation = self.conversations.get(span.span_id)
        if conversation is None:
            return self.own(span)
        request = [Said(str(message.get("role")), text_of(message)) for message in conversation.messages]
        known = max((_common(request, shown) for shown in self._shown), default=0)
        answer = [Said("answer", text_of(conversation.answer))] if conversation.answer else []
        self._shown.append(request + answer)
        earlier = [Said("...", f"{counted(known, 'message')} as above")] if known else []
        return earlier + request[known:] + answer


def lines_of(texts: Sequence[Said], indent: str, width: int) -> Iterator[str]:
    """`texts` in lines of at most `width` characters, the label in front; long texts are cut, with what is left out."""
    room = max(width - len(indent) - _LABEL_WIDTH - 1, 20)
    for label, text in texts:
        lines = [part for line in text[:_MAX_CHARS].splitlines() for part in _wrapped(line, room)]
        left = len(text) - sum(map(len, lines[:_MAX_LINES]))
        cut = [f"... {counted(left, 'more character')}; --json has all"] if len(lines) > _MAX_LINES else []
        if len(text) > _MAX_CHARS and not cut:
            cut = [f"... {counted(len(text) - _MAX_CHARS, 'more character')}; --json has all"]
        labels = [printable(label, _LABEL_WIDTH)]
        for line in [*lines[:_MAX_LINES], *cut] or [""]:
            yield f"{indent}{labels.pop() if labels else '':{_LABEL_WIDTH}} {line}".rstrip()


def _wrapped(line: str, width: int) -> list[str]:
    return textwrap.wrap(printable(line), width, replace_whitespace=False, drop_whitespace=False) or [""]


def _common(request: Sequence[Said], shown: Sequence[Said]) -> int:
    """Number of messages with which both begin; an answer is the next request's message of the assistant."""
    later = [said._replace(label="assistant") if said.label == "answer" else said for said in shown]
    pairs = enumerate(zip(request, later, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(request), len(later)))
