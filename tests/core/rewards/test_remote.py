"""A scorer behind HTTP: what is sent, what is read, and what is tried again."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from agl.errors import ConfigError, RewardError
from agl.rewards import Remote
from agl.store import Rollout


class Scorers:
    """Answers with `responses`, each a status and a body, one after another; the last one again and again."""

    def __init__(self) -> None:
        self.responses: list[tuple[int, str]] = []
        self.requests: list[tuple[dict[str, Any], str | None]] = []
        scorers = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                scorers.requests.append((body, self.headers["authorization"]))
                status, text = scorers.responses.pop(0) if len(scorers.responses) > 1 else scorers.responses[0]
                self.send_response(status)
                self.send_header("content-length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, format: str, *args: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/score"


@pytest.fixture
def scorers() -> Iterator[Scorers]:
    made = Scorers()
    thread = threading.Thread(target=made.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.server.shutdown()
    thread.join()
    made.server.server_close()


def test_it_sends_task_answer_and_rollout_and_tries_again(scorers: Scorers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCORER_KEY", "s3cret")
    scorers.responses = [(503, "busy"), (200, '{"goal": 0.5}')]
    remote = Remote(scorers.url, key_env="SCORER_KEY")
    assert remote({"q": 1}, "yes", Rollout("r1", None, group_id="g", mode="eval")) == {"goal": 0.5}
    sent = {"task": {"q": 1}, "answer": "yes", "rollout": {"id": "r1", "group": "g", "mode": "eval"}}
    assert scorers.requests == [(sent, "Bearer s3cret")] * 2


@pytest.mark.parametrize(
    ("response", "message"),
    [((400, "no such task"), "answered 400: no such task"), ((200, "<html>"), "'<html>', expected JSON")],
)
def test_a_response_that_is_no_result_is_an_error(scorers: Scorers, response: Any, message: str) -> None:
    scorers.responses = [response]
    with pytest.raises(RewardError, match=message):
        Remote(scorers.url)("task", "answer")
    assert len(scorers.requests) == 1


def test_what_cannot_be_reached_or_sent_is_an_error() -> None:
    with pytest.raises(RewardError, match=r"the scorer at http://\*\*\*@127.0.0.1:9 does not answer"):
        Remote("http://me:s3cret@127.0.0.1:9", retries=0)("task", "answer")
    with pytest.raises(RewardError, match="cannot be sent"):
        Remote("http://127.0.0.1:9")("task", object())
    with pytest.raises(ConfigError, match="the environment has no SCORER_KEY"):
        Remote("http://127.0.0.1:9", key_env="SCORER_KEY")
