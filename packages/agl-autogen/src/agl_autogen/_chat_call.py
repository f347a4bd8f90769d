"""`ChatCall`: a model call from its request to its response."""

from collections.abc import Mapping, Sequence
from typing import Any

from autogen_core.models import CreateResult, LLMMessage
from opentelemetry.context import Context, create_key, get_value, set_value
from opentelemetry.trace import Span, set_span_in_context

from agl.content.filter import ContentFilter
from agl.failsafe import never_raises
from agl_autogen._attributes import request_content, result_attributes, result_content
from agl_autogen._token_ids import TokenIdCapture

_CALL = create_key("agl-autogen-call")


class ChatCall:
    """A model call: its span, its token ids, and AutoGen's result once there is one."""

    def __init__(self, span: Span, content: ContentFilter) -> None:
        self.token_ids = TokenIdCapture()
        self.result: CreateResult | None = None
        self._span = span
        self._content = content

    @property
    def context(self) -> Context:
        """The OpenTelemetry context in which to make the request."""
        return set_value(_CALL, self, set_span_in_context(self._span))

    def describe_request(self, messages: Sequence[LLMMessage], options: Mapping[str, Any]) -> None:
        with never_raises("a model request is not on its span"):
            self._content.set_content(self._span, lambda: request_content(messages, options))

    def describe_response(self) -> None:
        with never_raises("a model answer is not on its span"):
            attributes = self.token_ids.attributes()
            try:
                if (result := self.result) is not None and self._span.is_recording():
                    attributes |= result_attributes(result)
                    attributes |= self._content.filtered(lambda: result_content(result))
            finally:  # in one call: each call costs more than each attribute
                self._span.set_attributes(attributes)


def current_call() -> ChatCall | None:
    """The call whose context is the current one."""
    call = get_value(_CALL)
    return call if isinstance(call, ChatCall) else None
