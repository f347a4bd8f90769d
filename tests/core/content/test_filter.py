"""`ContentFilter`: content is captured or not, and redacted before it is recorded."""

import json
import logging
from collections.abc import Callable
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import StatusCode

import agl
from agl import semconv
from agl.content.filter import CAPTURE_CONTENT, ContentFilter
from agl.errors import ConfigError

PROVIDER = TracerProvider()


def scrub(text: str) -> str:
    return text.replace("Ada", "***")


def put(content: ContentFilter, **attributes: str) -> dict[str, Any]:
    """Attributes of a span on which `content` sets `attributes`, whose keys are the names of constants."""
    span = PROVIDER.get_tracer("test").start_span("span")
    content.set_content(span, lambda: {getattr(semconv, name): value for name, value in attributes.items()})
    return dict(span.attributes or {})  # type: ignore[attr-defined]


def redacted(name: str, value: Any, redact: Callable[[str], str] = scrub) -> Any:
    """The JSON `value` of the attribute with the constant `name`, after redaction."""
    return json.loads(put(ContentFilter(redact=redact), **{name: json.dumps(value)})[getattr(semconv, name)])


def error_on_span(content: ContentFilter, error: Exception) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """Attributes and status message of a span marked with `error`, and attributes of its event."""
    span: Any = PROVIDER.get_tracer("test").start_span("span")
    try:
        raise error
    except Exception as raised:  # noqa: BLE001 - it needs a stack trace
        content.mark_error(span, raised)
    (event,) = span.events
    assert span.status.status_code is StatusCode.ERROR and event.name == "exception"
    return dict(span.attributes), span.status.description, dict(event.attributes)


@pytest.mark.parametrize(
    ("switch", "variable", "captured"),
    [
        (None, None, True),
        (None, "true", True),
        (None, "SPAN_ONLY", True),
        (None, " False ", False),
        (None, "NO_CONTENT", False),
        (None, "EVENT_ONLY", False),
        (True, "false", True),
        (False, "true", False),
    ],
)
def test_content_is_captured_unless_switched_off(
    switch: bool | None, variable: str | None, captured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(CAPTURE_CONTENT, raising=False)
    if variable is not None:
        monkeypatch.setenv(CAPTURE_CONTENT, variable)

    assert ContentFilter.of(switch).captured is captured


def test_content_that_is_not_captured_is_not_computed() -> None:
    asked: list[bool] = []
    span = PROVIDER.get_tracer("test").start_span("span")

    ContentFilter(captured=False).set_content(span, lambda: {"said": str(asked.append(True))})

    assert asked == [] and not span.attributes  # type: ignore[attr-defined]


def test_messages_are_redacted_in_every_part_except_names_and_ids() -> None:
    call = {"type": "tool_call", "id": "Ada-1", "name": "Ada", "arguments": {"name": "Ada", "tags": ["Ada", 7, None]}}
    answer = {"type": "tool_call_response", "id": "Ada-1", "response": [{"type": "text", "text": "Ada"}]}
    unknown = {"type": "video", "caption": {"Ada": "Ada"}}
    text = {"type": "text", "content": "I am Ada"}
    messages = [
        {"role": "Ada", "parts": [text, call, answer, unknown], "finish_reason": "Ada", "note": "Ada"},
    ]

    assert redacted("GEN_AI_OUTPUT_MESSAGES", messages) == [
        {
            "role": "Ada",
            "finish_reason": "Ada",
            "note": "***",
            "parts": [
                {"type": "text", "content": "I am ***"},
                call | {"arguments": {"name": "***", "tags": ["***", 7, None]}},
                answer | {"response": [{"type": "text", "text": "***"}]},
                {"type": "video", "caption": {"Ada": "***"}},
            ],
        }
    ]
    assert redacted("GEN_AI_INPUT_MESSAGES", messages) == redacted("GEN_AI_OUTPUT_MESSAGES", messages)
    assert redacted("GEN_AI_SYSTEM_INSTRUCTIONS", [text]) == [{"type": "text", "content": "I am ***"}]


def test_arguments_and_results_are_redacted_at_their_leaves() -> None:
    value = {"name": "Ada", "role": ["Ada", {"id": "Ada", "age": 36}], "Ada": None}
    expected = {"name": "***", "role": ["***", {"id": "***", "age": 36}], "Ada": None}

    assert redacted("GEN_AI_TOOL_CALL_ARGUMENTS", value) == expected
    assert redacted("GEN_AI_TOOL_CALL_RESULT", value) == expected
    assert redacted("GEN_AI_TOOL_CALL_RESULT", "for Ada") == "for ***"


def test_a_tool_definition_is_redacted_in_its_descriptions_alone() -> None:
    schema = {"type": "object", "properties": {"Ada": {"type": "string", "description": "Ada's age"}}}
    function = {"name": "Ada", "description": "Ask Ada", "parameters": schema}

    (definition,) = redacted("GEN_AI_TOOL_DEFINITIONS", [{"type": "function", "function": function}])

    assert definition["function"]["name"] == "Ada" and definition["function"]["description"] == "Ask ***"
    assert definition["function"]["parameters"]["properties"] == {"Ada": {"type": "string", "description": "***'s age"}}


def test_queries_and_documents_are_redacted() -> None:
    document = {"id": "Ada-1", "content": "Ada wrote it", "metadata": {"name": "Ada", "page": 3}}

    assert redacted("GEN_AI_RETRIEVAL_DOCUMENTS", [document]) == [
        {"id": "Ada-1", "content": "*** wrote it", "metadata": {"name": "***", "page": 3}}
    ]
    found = put(ContentFilter(redact=scrub), GEN_AI_RETRIEVAL_QUERY_TEXT="who is Ada")
    assert found == {"gen_ai.retrieval.query.text": "who is ***"}


def fails(text: str) -> str:
    raise LookupError(f"no rule for {text}")


@pytest.mark.parametrize("redact", [fails, lambda text: None, lambda text: text.encode()])
def test_content_whose_redaction_fails_is_left_out_and_logged_without_the_text(
    redact: Callable[[str], Any], caplog: pytest.LogCaptureFixture
) -> None:
    query, documents = "for Ada", json.dumps([{"id": "1", "content": 7, "metadata": {}}])

    found = put(ContentFilter(redact=redact), GEN_AI_RETRIEVAL_QUERY_TEXT=query, GEN_AI_RETRIEVAL_DOCUMENTS=documents)

    assert list(found) == ["gen_ai.retrieval.documents"]  # it has no text to redact
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert "gen_ai.retrieval.query.text is left out" in caplog.text and "Ada" not in caplog.text


def test_an_error_is_redacted_in_its_message_its_stack_trace_and_its_status() -> None:
    attributes, status, event = error_on_span(ContentFilter(redact=scrub), ValueError("no such customer: Ada"))

    assert attributes == {"error.type": "ValueError"}
    assert status == "ValueError: no such customer: ***"
    assert (event["exception.type"], event["exception.message"]) == ("ValueError", "no such customer: ***")
    assert "raise error" in event["exception.stacktrace"] and "ValueError: no such" in event["exception.stacktrace"]
    assert "Ada" not in event["exception.stacktrace"]


def test_an_error_whose_message_cannot_be_redacted_is_its_type(caplog: pytest.LogCaptureFixture) -> None:
    attributes, status, event = error_on_span(ContentFilter(redact=fails), ConfigError("Ada"))

    assert attributes == {"error.type": "ConfigError"} and status == "ConfigError"
    assert event == {"exception.type": "agl.errors.ConfigError"}
    assert len(caplog.records) == 2 and "Ada" not in caplog.text


class NoText(Exception):
    def __str__(self) -> str:
        return self.args[5]


def test_an_error_without_text_still_has_its_status(caplog: pytest.LogCaptureFixture) -> None:
    attributes, status, event = error_on_span(ContentFilter(), NoText())

    assert (attributes, status) == ({"error.type": "NoText"}, "NoText: <NoText without text>")
    assert "NoText" in event["exception.stacktrace"]
    assert caplog.records == []


def test_without_captured_content_an_error_is_its_type() -> None:
    """Its message may quote a prompt or an argument, and its stack trace ends with the message."""
    attributes, status, event = error_on_span(ContentFilter(captured=False), ValueError("no such customer: Ada"))

    assert (attributes, status, event) == ({"error.type": "ValueError"}, "ValueError", {"exception.type": "ValueError"})


def test_the_error_of_a_rollout_has_its_message_only_if_content_is_captured(
    memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def status_of_failed_rollout() -> str:
        memory.clear()
        with pytest.raises(ValueError, match="Ada"), agl.rollout():
            raise ValueError("Ada")
        return memory.get_finished_spans()[0].status.description

    assert status_of_failed_rollout() == "ValueError: Ada"
    monkeypatch.setenv(CAPTURE_CONTENT, "false")
    assert status_of_failed_rollout() == "ValueError"


def test_a_redact_that_is_not_callable_is_refused() -> None:
    with pytest.raises(ConfigError, match="redact is 'yes', expected a function from str to str"):
        ContentFilter.of(redact="yes")  # type: ignore[arg-type]
