"""A model call under way: its span, and what is known of the answer."""

from collections.abc import Mapping, Sequence
from typing import Any

from autogen_core.models import CreateResult, LLMMessage
from opentelemetry.context import Context, create_key, get_value, set_value
from opentelemetry.trace import Span, set_span_in_context

from agl.content.filter import ContentFilter
from agl.failsafe import never_raises
from agl_autogen._answer import Answer
from agl_autogen._attributes import request_content, result_attributes, result_content

_CALL = create_key("agl-autogen-call")


class Call:
    """A model call, from its request to its answer."""

    def __init__(self, span: Span, content: ContentFilter) -> None:
        self.answer = Answer()
        self.result: CreateResult | None = None
        self.hidden: frozenset[str] = frozenset()
        """Fields of the answer that we asked the server for, and the user did not."""
        self._span = span
        self._content = content

    @property
    def context(self) -> Context:
        """The OpenTelemetry context to make the request in."""
        return set_value(_CALL, self, set_span_in_context(self._span))

    def describe_request(self, messages: Sequence[LLMMessage], options: Mapping[str, Any]) -> None:
        with never_raises("a model request is not on its span"):
            self._content.set_content(self._span, lambda: request_content(messages, options))

    def describe_answer(self) -> None:
        with never_raises("a model answer is not on its span"):
            said = self.answer.attributes()
            try:
                if (result := self.result) is not None and self._span.is_recording():
                    said |= result_attributes(result)
                    said |= self._content.filtered(lambda: result_content(result))
            finally:  # all at once: a span takes longer over each time than over each attribute
                self._span.set_attributes(said)

    def note_response(self, response: Mapping[str, Any]) -> Mapping[str, Any]:
        """Read a whole response of the server, and return it as the user asked for it."""
        self.answer.note_response(response)
        if not self.hidden:
            return response
        # null is what vLLM sends for a field that nobody asked for
        choices = [_nulled(choice, self.hidden) for choice in response.get("choices") or []]
        return _nulled(response, self.hidden) | {"choices": choices}

    def note_chunk(self, chunk: Any) -> None:
        """Read a chunk of a stream, and leave on it what the user asked for."""
        self.answer.note_chunk(chunk)
        if "logprobs" in self.hidden:
            for choice in chunk.choices:
                choice.logprobs = None

    def shown(self, result: CreateResult) -> CreateResult:
        """`result` as the user asked for it."""
        if "logprobs" in self.hidden:
            result.logprobs = None
        return result


def _nulled(fields: Mapping[str, Any], names: frozenset[str]) -> dict[str, Any]:
    return {name: None if name in names else value for name, value in fields.items()}


def current_call() -> Call | None:
    """The call that code here belongs to."""
    call = get_value(_CALL)
    return call if isinstance(call, Call) else None
