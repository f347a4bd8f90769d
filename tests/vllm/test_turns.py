"""Conversations with real vLLM: prompts built from recorded tokens, and the drift named without them."""

from typing import Any

import httpx
import pytest

from agl import semconv
from agl.span import Span
from agl.tokens.drift import Drift, Drifted
from agl.trajectory import build_trajectory
from tests.gateway.serving import Setup, gateway, ids, output
from tests.vllm.conftest import BASE

pytestmark = pytest.mark.timeout(2400)  # the first test waits until vLLM is installed and has started

QUESTIONS = ("Say some words.", "And some more?", "Once more.")


def converse(setup: Setup, vllm_url: str, *, stream: bool = False) -> list[Span]:
    """Turns in which the model can sample single letters only, so that its answers retokenize differently.

    The last turn is greedy.
    """
    root = vllm_url.removesuffix("/v1")
    letters = [
        httpx.post(f"{root}/tokenize", json={"model": BASE, "prompt": letter}).json()["tokens"][0]
        for letter in "ehinrt"
    ]
    body: dict[str, Any] = {"model": BASE, "max_tokens": 12, "allowed_token_ids": letters, "stream": stream}
    messages: list[dict[str, Any]] = []
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        url = f"{setup.url}/rollout/r1/attempt/a1/v1/chat/completions"
        temperature = 0.0 if question == QUESTIONS[-1] else 1.0
        answer = httpx.post(url, json=body | {"messages": messages, "temperature": temperature}, timeout=300)
        assert answer.status_code == 200, answer.text
        (part,) = output(setup.store.appended[-1])["parts"]
        messages.append({"role": "assistant", "content": part["content"]})
    return setup.store.appended


@pytest.mark.parametrize("stream", [False, True])
def test_prompts_built_from_recorded_tokens_give_one_row(vllm_url: str, stream: bool) -> None:
    with gateway(engines=[{"url": vllm_url}], exact_prefix=True) as setup:
        spans = converse(setup, vllm_url, stream=stream)
        assert [span.text(semconv.GATEWAY_PREFIX) for span in spans] == [None, "exact", "exact"]
        (row,) = build_trajectory(setup.store.query_spans("r1")).rows
        assert [turn.drift for turn in row.turns] == [None, Drift.CLEAN, Drift.CLEAN]
    prompt, answer = (ids(spans[-1], name) for name in (semconv.PROMPT_TOKEN_IDS, semconv.RESPONSE_TOKEN_IDS))
    body = {"model": BASE, "prompt": prompt, "max_tokens": 12, "temperature": 0, "return_token_ids": True}
    direct = httpx.post(f"{vllm_url}/completions", json=body | {"allowed_token_ids": sorted({*answer})}, timeout=300)
    (choice,) = direct.json()["choices"]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == (prompt, answer)


def test_without_recorded_tokens_the_drift_shows_vllms_text(vllm_url: str) -> None:
    with gateway(engines=[{"url": vllm_url}]) as setup:
        spans = converse(setup, vllm_url)
    drifts = [Drifted.of_json(span.text(semconv.GATEWAY_DRIFT) or "") for span in spans]
    assert drifts[0] is None
    for drifted in drifts[1:]:
        assert drifted is not None and drifted.kind == Drift.RETOKENIZED
        sampled, there = drifted.difference.sampled_text, drifted.difference.prompt_text
        assert sampled and there and len(sampled) == 1 and there.startswith(sampled)
