"""Ids read from a span, under our names and those of other tools."""

import json
from typing import Any

import pytest

from agl.span import Span

TRACE = "a" * 32


def make(attributes: dict[str, Any], resource: dict[str, Any] | None = None) -> Span:
    return Span(TRACE, "1" * 16, None, "span", 0, 1, attributes, resource=resource or {})


def test_the_rollout_is_ours_else_agentlightnings_else_the_trace() -> None:
    theirs = {"agentlightning.rollout_id": "theirs"}
    assert make({"agl.rollout.id": "ours"} | theirs, theirs).rollout_id == "ours"
    assert make(theirs, {"agentlightning.rollout_id": "of the process"}).rollout_id == "theirs"
    assert make({}, theirs).rollout_id == "theirs"
    assert make({}, {"agentlightning.rollout_id": ""}).rollout_id == TRACE
    assert (make({}).rollout_id, make({}).named_rollout) == (TRACE, None)


@pytest.mark.parametrize(
    "answer",
    [
        {"generations": [[]], "llm_output": {"id": "chatcmpl-7"}},  # LangChain's
        {"id": "chatcmpl-7", "object": "chat.completion"},  # the OpenAI client's
    ],
)
def test_the_response_id_of_openinference_is_read_from_the_response(answer: dict[str, Any]) -> None:
    attributes = {"openinference.span.kind": "LLM", "output.value": json.dumps(answer)}
    assert make(attributes).response_id == "chatcmpl-7"
    assert make(attributes | {"openinference.span.kind": "CHAIN"}).response_id is None
    assert make(attributes | {"gen_ai.response.id": "chatcmpl-8"}).response_id == "chatcmpl-8"


@pytest.mark.parametrize(
    "answer",
    ["", "__REDACTED__", "[1]", "7", '{"id": 7}', '{"llm_output": {"id": null}}', '{"llm_output": null}', '{"'],
)
def test_a_response_without_an_id_has_none(answer: str) -> None:
    assert make({"openinference.span.kind": "LLM", "output.value": answer}).response_id is None
