"""The text of a rollout's spans: prompts and answers, tool calls with their results, and what emitters recorded."""

from collections.abc import Sequence
from typing import Final, NamedTuple

from agl import semconv
from agl.inspection.conversation import read_conversation, text_of
from agl.span import Span
from agl.trajectory import Call

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
        earlier = [Said("...", f"{known} message{'s' * (known > 1)} as above")] if known else []
        return earlier + request[known:] + answer


def _common(request: Sequence[Said], shown: Sequence[Said]) -> int:
    """Number of messages with which both begin; an answer is the next request's message of the assistant."""
    later = [said._replace(label="assistant") if said.label == "answer" else said for said in shown]
    pairs = enumerate(zip(request, later, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(request), len(later)))
