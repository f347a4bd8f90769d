"""SGLang: requesting and reading token ids."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from agl import semconv
from agl.config import GatewayConfig
from agl.server.app_thread import AppThread
from agl.tokens.drift import Drifted
from agl.trajectory import build_trajectory
from tests.core.fake_engine import END, PROMPT_IDS, TURN, WORDS
from tests.gateway.serving import IDS, Setup, assert_tokens, chat_body, gateway, ids, parsed
from tests.gateway.sglang_engine import SglangEngine

URL = "/rollout/r1/attempt/a1/v1/chat/completions"
TURNS = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "".join(WORDS)},
    {"role": "user", "content": "on"},
]


@pytest.fixture(scope="module")
def sglang() -> Iterator[tuple[SglangEngine, str]]:
    engine, server = SglangEngine(), AppThread()
    url = server.add(engine.app) + "/v1"
    with server:
        yield engine, url


@pytest.fixture
def setup(sglang: tuple[SglangEngine, str]) -> Iterator[Setup]:
    with gateway(engines=[{"url": sglang[1], "kind": "sglang"}]) as setup:
        yield setup


@pytest.mark.parametrize("stream", [False, True])
def test_ids_after_the_answer_are_recorded_and_train(setup: Setup, stream: bool) -> None:
    assert setup.post(chat_body(stream=stream, n=2), URL).status_code == 200
    for number, span in enumerate(setup.store.appended):
        assert_tokens(span, number)
    trajectory = build_trajectory(setup.store.query_spans("r1"))
    assert [row.token_ids[:3] for row in trajectory.rows] == [PROMPT_IDS, PROMPT_IDS] and not trajectory.drops


def test_a_completion_is_recorded(setup: Setup) -> None:
    setup.post({"model": "writer@3", "prompt": "p"}, "/v1/completions")
    assert_tokens(setup.span())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"logprobs": True},
        {"return_output_ids_in_sglext": True},
        {"return_input_ids_in_sglext": True, "return_output_ids_in_sglext": True},
        {"return_output_ids_in_sglext": False},
    ],
)
def test_the_client_gets_the_response_that_the_engine_would_send(
    setup: Setup, sglang: tuple[SglangEngine, str], asked: dict[str, Any], stream: bool
) -> None:
    body = chat_body(stream=stream, **asked)
    if stream:
        body["stream_options"] = {"include_usage": True}
    through, direct = setup.post(body, URL), httpx.post(f"{sglang[1]}/chat/completions", json=body)
    assert through.status_code == direct.status_code == 200
    assert parsed(through, stream) == parsed(direct, stream)


def test_ids_are_requested_by_sglang_s_fields(setup: Setup, sglang: tuple[SglangEngine, str]) -> None:
    setup.post(chat_body(stream=True), URL)
    sent = sglang[0].seen[-1]
    assert sent["return_input_ids_in_sglext"] is sent["return_output_ids_in_sglext"] is True
    assert "return_token_ids" not in sent


@pytest.mark.parametrize("stream", [False, True])
def test_an_exact_prompt_is_sent_as_input_ids(sglang: tuple[SglangEngine, str], stream: bool) -> None:
    with gateway(engines=[{"url": sglang[1], "kind": "sglang"}], exact_prefix=True) as setup:
        for messages in (TURNS[:1], TURNS):
            setup.post(chat_body(stream=stream) | {"messages": messages}, URL)
        span = setup.store.appended[-1]
        expected = PROMPT_IDS + IDS + [TURN, ord("o"), ord("n"), END, TURN]
        assert sglang[0].seen[-1]["input_ids"] == ids(span, semconv.PROMPT_TOKEN_IDS) == expected
        assert span.text(semconv.GATEWAY_PREFIX) == "exact"


def test_drift_has_the_texts_that_sglang_reports(setup: Setup) -> None:
    for messages in (TURNS[:1], TURNS):
        setup.post(chat_body() | {"messages": messages}, URL)
    drifted = Drifted.of_json(setup.store.appended[-1].text(semconv.GATEWAY_DRIFT) or "")
    assert drifted is not None
    assert (drifted.difference.sampled_text, drifted.difference.prompt) == (f"<{IDS[0]}>", None)


@pytest.mark.parametrize("models", [[], ["planner"]])
def test_engines_of_the_same_model_are_of_one_kind(models: list[str]) -> None:
    engines = [
        {"url": "http://a/v1", "models": ["planner"]},
        {"url": "http://b/v1", "kind": "sglang", "models": models},
    ]
    with pytest.raises(ValidationError, match="serve the same models, so both must be of one kind"):
        GatewayConfig.model_validate({"engines": engines})
    engines[1]["models"] = ["judge"]
    GatewayConfig.model_validate({"engines": engines})


def test_an_exact_prefix_without_ids_is_refused() -> None:
    settings = {"exact_prefix": True, "extra_body": {"return_token_ids": None}}
    with pytest.raises(ValidationError, match="exact_prefix needs the token ids"):
        GatewayConfig.model_validate(settings)
