"""A judge for tests: an OpenAI-compatible server that ranks by a function of the test."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from agl.config import JudgeConfig
from agl.rewards.judge import Judge
from agl.secret_url import SecretUrl

Rank = Callable[[list[str], int], Any]
"""From the attempts as they stand in the prompt, and the number of the request, to what the model says.

A number is the status of the response, bytes are its whole body.
"""


class ScriptedJudge:
    """An OpenAI-compatible server that ranks by `rank`."""

    def __init__(self, rank: Rank) -> None:
        self.rank = rank
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        judge = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                judge.requests.append(body)
                judge.keys.append(self.headers.get("authorization"))
                ranking = judge.rank(attempts_of(body), len(judge.requests))
                status = ranking if isinstance(ranking, int) else 200
                usage = {"prompt_tokens": 100, "completion_tokens": 7}
                answer = {"choices": [{"message": {"content": ranking}}], "usage": usage}
                data = ranking if isinstance(ranking, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self) -> "ScriptedJudge":
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


def attempts_of(body: dict[str, Any]) -> list[str]:
    """The attempts of a prompt, in its order."""
    text = body["messages"][1]["content"]
    return [part.split("\n</attempt>")[0].split(">\n", 1)[1] for part in text.split("<attempt number=")[1:]]


def longest_first(attempts: list[str], _: int) -> str:
    order = sorted(range(len(attempts)), key=lambda place: -len(attempts[place]))
    return f'They differ. {{"ranking": {[place + 1 for place in order]}}}'


def judge_of(server: ScriptedJudge, *, seed: int = 0, **options: Any) -> Judge:
    return Judge(
        JudgeConfig(url=SecretUrl(server.url), model="gpt", criteria="The longer the better.", **options), seed=seed
    )
