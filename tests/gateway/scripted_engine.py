"""An engine whose responses a test writes itself: JSON, or the chunks of a stream."""

import json
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from tests.core.fake_engine import Answer, FakeEngine, Json


@dataclass
class ScriptedEngine(FakeEngine):
    """Answers `whole`, or to a request for a stream `chunks` (text as it is) and, unless it `breaks_off`, `[DONE]`."""

    whole: Any = None
    chunks: list[Any] = field(default_factory=list)
    breaks_off: bool = False
    streams: bool | None = None
    """Whether it streams, whatever is requested."""

    async def _answer(self, request: Request, answer: Answer) -> Response:
        if not (answer.body.get("stream") if self.streams is None else self.streams):
            return Response(json.dumps(self.whole), media_type="application/json")
        events = [chunk if isinstance(chunk, str) else f"data: {json.dumps(chunk)}\n\n" for chunk in self.chunks]
        end = [] if self.breaks_off else ["data: [DONE]\n\n"]
        return StreamingResponse(iter(events + end), media_type="text/event-stream")


def answering(*choices: Json, **fields: Any) -> ScriptedEngine:
    """Whole or streamed, it answers `choices`, each with the default `choice` where it sets nothing."""
    written = [choice(number) | given for number, given in enumerate(choices)]
    whole = envelope(written) | fields
    chunks = [envelope([streamed(one)]) | fields for one in written]
    return ScriptedEngine(whole=whole, chunks=chunks)


def envelope(choices: list[Json]) -> Json:
    return {
        "id": "c-1",
        "object": "chat.completion",
        "model": "base",
        "prompt_token_ids": [1, 2, 3],
        "choices": choices,
    }


def choice(number: int = 0, ids: tuple[int, ...] = (10, 11)) -> Json:
    logprobs = {"content": [{"token": "t", "logprob": -0.5} for _ in ids]}
    message = {"role": "assistant", "content": "hi"}
    return {
        "index": number,
        "message": message,
        "finish_reason": "stop",
        "logprobs": logprobs,
        "token_ids": list(ids),
    }


def streamed(whole: Json) -> Json:
    """The choice `whole` as one chunk."""
    return {name: value for name, value in whole.items() if name != "message"} | {"delta": whole.get("message")}
