"""Every real client, in a separate process and, if needed, a separate environment, against one gateway."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from agl import semconv
from agl.span import Span
from tests.core.fake_engine import WORDS
from tests.gateway.serving import IDS, LOGPROBS, Setup, assert_tokens, gateway, ids, wait_until
from tests.node import folder_with
from tests.venv import python_with

HERE = Path(__file__).parent
TEXT = "".join(WORDS)
EXPECTED: dict[str, Any] = {
    "choices": [TEXT, TEXT],
    "logprobs": LOGPROBS,
    "unasked": [None, False],
    "cancelled": "left",
    "many": [TEXT],
}
"""What a situation gives, where it is not the text."""
TOOL_CALLS = (["search", '{"x": 1}'], ["search", {"x": 1}])
"""The form in the response, and the form in which some clients return it."""


@dataclass(frozen=True)
class Client:
    """A command that goes through its situations, given the gateway's URL, and prints what each gave."""

    command: Callable[[], list[str | Path]]
    folder: Path = HERE / "clients"
    situations: int = 6


def python(script: str, environment: str = "", *requirements: str, over_ours: bool = False) -> Client:
    def command() -> list[str | Path]:
        ours = Path(sys.executable)
        return [python_with(environment, *requirements, over_ours=over_ours) if environment else ours, f"{script}.py"]

    return Client(command)


CLIENTS = {
    "openai": python("openai_client"),
    "openai 1": python("openai_client", "openai-1", "openai==1.109.1"),
    "openai before 1": python("openai_before_1", "openai-before-1", "openai==0.28.1"),
    "LangChain": python("langchain_client"),
    "AutoGen": python("autogen_client"),
    "LiteLLM": python("litellm_client", "litellm", "litellm==1.106.2", "mcp>=2,<3"),
    "anthropic": python("anthropic_client", "anthropic", "anthropic==2.12.0"),
    "requests, httpx and curl": python("raw"),
    "JavaScript": Client(lambda: ["node", folder_with("javascript-openai", HERE / "javascript") / "client.js"]),
}


@pytest.mark.timeout(900)  # The first time environments are made.
@pytest.mark.parametrize("name", CLIENTS)
def test_a_client_gets_the_engine_s_response_and_every_call_has_its_tokens(name: str) -> None:
    client = CLIENTS[name]
    command = client.command()
    with gateway() as setup:
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("OPENAI", "ANTHROPIC"))}
        done = subprocess.run(
            [*command, setup.url], cwd=client.folder, env=environment, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr
        results = json.loads(done.stdout.splitlines()[-1])
        assert len(results) >= client.situations
        for situation, result in results.items():
            if situation.startswith("tools"):
                assert result in TOOL_CALLS, situation
            else:
                assert result == EXPECTED.get(situation, TEXT), situation
        check_record(setup, set(results))


def check_record(setup: Setup, situations: set[str]) -> None:
    wait_until(lambda: situations <= {span.rollout_id for span in setup.store.appended})
    by_situation = {name: [span for span in setup.store.appended if span.rollout_id == name] for name in situations}
    check_cancelled(setup, *by_situation.pop("cancelled"))
    assert len(by_situation["many"]) == 100
    if "choices" in by_situation:
        first, second = by_situation.pop("choices")
        assert_tokens(first, 0)
        assert_tokens(second, 1)
    for situation, spans in by_situation.items():
        assert situation == "many" or len(spans) == 1
        for span in spans:
            assert (span.status, span.status_message) == ("ok", ""), situation
            assert_tokens(span)
    if "settings" in situations:
        (sent,) = [body for body in setup.engine.seen if body.get("response_format")]
        assert (sent["stop"], sent["seed"], sent["temperature"]) == (["END"], 7, 0.5)
        assert sent["response_format"] == {"type": "json_object"}


def check_cancelled(setup: Setup, span: Span) -> None:
    assert span.text(semconv.ERROR_TYPE) == "cancelled"
    sampled = ids(span, semconv.RESPONSE_TOKEN_IDS)
    assert sampled[:2] == IDS[:2] and len(sampled) < 300
    wait_until(lambda: setup.engine.streams_cut == 1)
