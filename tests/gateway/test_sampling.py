"""What engines sample from: training calls use the model's full distribution, or their spans name what prevents it."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from agl import semconv
from agl.gateway.engine_kind import ENGINE_KINDS
from agl.gateway.request import constraints
from agl.trajectory import build_trajectory
from tests.core.fake_engine import FakeEngine
from tests.gateway.serving import Setup, chat_body, gateway, serving

NEUTRAL = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
SHAPING = {
    "top_p": 0.7,
    "top_k": 20,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "frequency_penalty": 0.5,
    "presence_penalty": 0.5,
    "logit_bias": {"7": -100},
    "bad_words": ["no"],
    "min_tokens": 3,
    "best_of": 2,
    "use_beam_search": True,
}
REMOVED = [name for name in SHAPING if name not in NEUTRAL]
TRAIN = {"baggage": "agl.rollout.id=r1,agl.attempt.id=a1,agl.mode=train"}
MESSAGES = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "search", "parameters": {"type": "object"}}}
STRICT = {"type": "function", "function": TOOL["function"] | {"strict": True}}  # type: ignore[operator]  # a dict
DIALECTS = {
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/completions": {"prompt": "hi"},
    "/v1/responses": {"input": "hi"},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 9},
}


@pytest.fixture(scope="module", params=["vllm", "sglang"])
def served(request: pytest.FixtureRequest) -> Iterator[Setup]:
    engine = FakeEngine()
    with serving(engine) as url, gateway(engines=[{"url": url, "kind": request.param}]) as setup:
        yield Setup(setup.store, engine, setup.url)


@pytest.fixture
def setup(served: Setup) -> Setup:
    served.store.appended.clear()
    served.engine.seen.clear()
    return served


def changed(setup: Setup) -> dict[str, Any]:
    return json.loads(setup.span().text(semconv.GATEWAY_CHANGED) or "{}")


# --- Fields that shape the distribution ------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "body"), DIALECTS.items())
def test_a_training_call_samples_from_the_full_distribution(setup: Setup, path: str, body: dict[str, Any]) -> None:
    assert setup.post({"model": "writer@3"} | body | SHAPING, path, **TRAIN).status_code == 200
    (sent,) = setup.engine.seen
    assert {name: sent.get(name) for name in SHAPING} == NEUTRAL | dict.fromkeys(REMOVED)
    span = setup.span()
    assert json.loads(span.text(semconv.GATEWAY_REQUEST) or "")["top_p"] == 0.7
    assert {name: changed(setup)[name] for name in NEUTRAL} == NEUTRAL
    assert semconv.GATEWAY_CONSTRAINTS not in span.attributes


def test_the_model_s_own_defaults_are_overridden_too(setup: Setup) -> None:
    """vLLM and SGLang take top_p and the like from `generation_config.json` if the request leaves them out."""
    setup.post(chat_body(), **TRAIN)
    assert {name: setup.engine.seen[0].get(name) for name in NEUTRAL} == NEUTRAL


@pytest.mark.parametrize("mode", ["eval", "prod"])
def test_other_modes_keep_what_the_client_asks_for_and_record_it(setup: Setup, mode: str) -> None:
    setup.post(chat_body(**SHAPING), baggage=f"agl.mode={mode}")
    assert {name: setup.engine.seen[0][name] for name in SHAPING} == SHAPING
    assert setup.span().attributes[semconv.GATEWAY_CONSTRAINTS] == list(SHAPING)


def test_extra_body_shapes_no_training_call_and_removes_what_an_engine_refuses() -> None:
    engine = FakeEngine()
    with serving(engine) as url, gateway(engines=[{"url": url}], extra_body={"top_p": 0.5, "top_k": None}) as setup:
        setup.post(chat_body(top_k=3), **TRAIN)
        assert engine.seen[0]["top_p"] == 1.0 and "top_k" not in engine.seen[0]


@pytest.mark.parametrize(("path", "body"), DIALECTS.items())
def test_declared_limits_are_forced_in_training_calls_and_recorded(path: str, body: dict[str, Any]) -> None:
    """The client's own are replaced, and those that are not declared are neutral."""
    engine, declared = FakeEngine(), {"top_p": 0.9, "min_p": 0.05}
    overrides = {"train": {"temperature": 0.7} | declared}
    with serving(engine) as url, gateway(engines=[{"url": url}], overrides=overrides) as setup:
        setup.post({"model": "writer@3"} | body | SHAPING, path, **TRAIN)
        setup.post({"model": "writer@3"} | body | SHAPING, path, baggage="agl.mode=prod")
        trained, served = engine.seen
        assert {name: trained.get(name) for name in SHAPING} == NEUTRAL | dict.fromkeys(REMOVED) | declared
        span, other = setup.store.appended
        assert json.loads(span.text(semconv.GATEWAY_SAMPLING) or "") == declared
        assert semconv.GATEWAY_CONSTRAINTS not in span.attributes
        assert served["top_p"] == SHAPING["top_p"] and semconv.GATEWAY_SAMPLING not in other.attributes
        assert "top_p" in other.attributes[semconv.GATEWAY_CONSTRAINTS]  # type: ignore[operator]  # an array


def test_the_engine_of_this_project_gets_no_fields_that_it_does_not_need() -> None:
    with gateway() as setup:
        setup.post(chat_body(top_p=0.7, logit_bias={"7": 1}), **TRAIN)
        assert not setup.engine.seen[0].keys() & SHAPING.keys()
        assert changed(setup)["top_p"] is None


# --- Fields that constrain the answer --------------------------------------------------------------------------------


def test_a_constrained_call_is_recorded_as_such(setup: Setup) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
    setup.post(chat_body(response_format=schema, top_p=0.7), **TRAIN)
    assert setup.engine.seen[0]["response_format"] == schema
    (call,) = build_trajectory(setup.store.appended).calls
    assert call.constraints == ("response_format",)


@pytest.mark.parametrize(
    ("path", "choice"),
    [("/v1/messages", {"type": "any"}), ("/v1/responses", {"type": "function", "name": "search"})],
)
def test_a_forced_tool_of_a_translated_api_is_recorded(setup: Setup, path: str, choice: dict[str, str]) -> None:
    tools = {
        "/v1/messages": [{"name": "search", "input_schema": {"type": "object"}}],
        "/v1/responses": [{"type": "function", "name": "search", "parameters": {}}],
    }
    body = {"model": "writer@3"} | DIALECTS[path] | {"tools": tools[path], "tool_choice": choice}
    assert setup.post(body, path, **TRAIN).status_code == 200
    assert setup.span().attributes[semconv.GATEWAY_CONSTRAINTS] == ["tool_choice"]


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({}, []),
        ({"n": 4, "stop": ["END"], "stop_token_ids": [7], "ignore_eos": True, "max_tokens": 3, "seed": 1}, []),
        (NEUTRAL | {"top_k": 0, "frequency_penalty": 0.0, "logit_bias": {}, "best_of": 1, "min_tokens": 0}, []),
        ({"response_format": {"type": "text"}, "regex": None, "guided_json": None, "allowed_token_ids": []}, []),
        ({"tools": [TOOL]}, []),
        ({"tools": [TOOL], "tool_choice": "auto"}, []),
        ({"tools": [STRICT], "tool_choice": "none"}, []),
        ({"tools": [TOOL], "tool_choice": "required"}, ["tool_choice"]),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "search"}}}, ["tool_choice"]),
        ({"tools": [STRICT]}, ["tools[].function.strict"]),
        ({"response_format": {"type": "json_object"}}, ["response_format"]),
        ({"structured_outputs": {"choice": ["a", "b"]}}, ["structured_outputs"]),
        ({"guided_regex": "a+", "top_p": 0.9}, ["top_p", "guided_regex"]),
        ({"ebnf": "root ::= 'a'"}, ["ebnf"]),
        ({"allowed_token_ids": [3]}, ["allowed_token_ids"]),
        ({"thinking_token_budget": 0}, ["thinking_token_budget"]),
        ({"tools": "none", "tool_choice": 3, "top_p": "high"}, ["top_p"]),
    ],
)
def test_fields_that_mask_or_shift_tokens_are_found(kind: str, fields: dict[str, Any], names: list[str]) -> None:
    assert constraints(chat_body(**fields), ENGINE_KINDS[kind]) == names


def test_the_engine_of_this_project_starts_a_forced_call_in_the_prompt_and_masks_nothing() -> None:
    body = chat_body(tools=[STRICT], tool_choice="required")
    assert constraints(body, ENGINE_KINDS["agl"]) == []
    assert constraints(body, ENGINE_KINDS["vllm"]) == ["tool_choice", "tools[].function.strict"]
