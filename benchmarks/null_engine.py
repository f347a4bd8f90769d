"""An engine that costs next to nothing: it answers every call with 16 tokens, immediately or after a delay.

    python -m benchmarks.null_engine PORT

The last message of a request states the wished-for answer (`wish`). Number n yields the token ids n, n+1, ... The
delay is the time to the first token and, in a stream, also the time between the first and the second half of the
tokens. A stream can be held between the halves until a given number of streams have reached that point. The header
`server-timing` of an answer that is no stream has the time in ms that the engine took.
"""

import asyncio
import json
import re
import sys
from typing import Any

TOKENS = 16
_WISH = re.compile(rb"call (\d+) after (\d+) ms with (\d+)")
_MEETINGS: dict[int, asyncio.Barrier] = {}
"""Barrier at which streams wait for each other, by the number of streams."""
_OK = (
    b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nserver-timing: engine;dur=%.3f\r\n"
    b"content-length: %d\r\n\r\n%b"
)
_STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def wish(number: int, delay_ms: int, together: int = 1) -> str:
    """Message that asks for the ids of `number` after `delay_ms`; a stream waits until `together` streams are open."""
    return f"call {number} after {delay_ms} ms with {together}"


def prompt_ids(number: int) -> list[int]:
    return [number, number + 1, number + 2]


def token_ids(number: int) -> list[int]:
    return list(range(number, number + TOKENS))


class NullEngine(asyncio.Protocol):
    """One connection of a client."""

    def __init__(self) -> None:
        self._received = b""
        self._busy: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        if self._busy is not None:
            self._busy.cancel()

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, end, body = self._received.partition(b"\r\n\r\n")
        if not end:
            return
        headers = dict(_header(line) for line in head.split(b"\r\n")[1:])
        if len(body) < int(headers.get(b"content-length", 0)):
            return
        self._received = b""
        loop = asyncio.get_running_loop()
        self._begun_s = loop.time()
        if head.startswith(b"GET"):
            return self._send(json.dumps({"object": "list", "data": [{"id": "null", "object": "model"}]}).encode())
        wished = _WISH.findall(body)
        number, delay_ms, together = map(int, wished[-1]) if wished else (0, 0, 1)
        delay_s = delay_ms / 1000
        if b'"stream":true' in body.replace(b" ", b""):
            self._busy = asyncio.ensure_future(self._stream(number, delay_s, together))
        elif delay_s:
            loop.call_later(delay_s, self._send, _whole(number))
        else:
            self._send(_whole(number))

    def _send(self, body: bytes) -> None:
        took_ms = (asyncio.get_running_loop().time() - self._begun_s) * 1000
        self._transport.write(_OK % (took_ms, len(body), body))

    async def _stream(self, number: int, delay_s: float, together: int) -> None:
        self._transport.write(_STREAM)
        events = _events(number)
        half = len(events) // 2
        for part, meets in ((events[:half], True), (events[half:], False)):
            await asyncio.sleep(delay_s)
            for event in part:
                self._transport.write(b"%x\r\n%b\r\n" % (len(event), event))
                await asyncio.sleep(0)
            if meets:
                await _MEETINGS.setdefault(together, asyncio.Barrier(together)).wait()
        self._transport.write(b"0\r\n\r\n")


def _header(line: bytes) -> tuple[bytes, bytes]:
    name, _, value = line.partition(b":")
    return name.lower(), value.strip()


def _head(number: int, kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{number}", "object": kind, "created": 1, "model": "null"}


def _whole(number: int) -> bytes:
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": "word " * TOKENS},
        "logprobs": {"content": [_logprob(place) for place in range(TOKENS)]},
        "finish_reason": "stop",
        "token_ids": token_ids(number),
    }
    answer = _head(number, "chat.completion") | {"choices": [choice], "prompt_token_ids": prompt_ids(number)}
    return json.dumps(
        answer | {"usage": {"prompt_tokens": 3, "completion_tokens": TOKENS, "total_tokens": 19}}
    ).encode()


def _events(number: int) -> list[bytes]:
    head = _head(number, "chat.completion.chunk")
    opening = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    chunks = [head | {"choices": [opening], "prompt_token_ids": prompt_ids(number)}]
    for place, token_id in enumerate(token_ids(number)):
        choice = {
            "index": 0,
            "delta": {"content": "word "},
            "logprobs": {"content": [_logprob(place)]},
            "finish_reason": "stop" if place == TOKENS - 1 else None,
            "token_ids": [token_id],
        }
        chunks.append(head | {"choices": [choice]})
    return [b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks] + [b"data: [DONE]\n\n"]


def _logprob(place: int) -> dict[str, Any]:
    return {"token": "word ", "logprob": -place / 8, "bytes": None, "top_logprobs": []}


async def _serve(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(NullEngine, "127.0.0.1", port, backlog=2048)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1])))
