"""Many simultaneous clients at the lowest cost that Python allows: each one HTTP/1.1 connection that calls repeatedly.

    python -m benchmarks.http_load BASE_URL CLIENTS CALLS DELAY_MS stream|whole
    python -m benchmarks.http_load BASE_URL ROLLOUTS WAVE DELAY_MS rollout

The first form prints latency percentiles in milliseconds and calls per second. In the second, all rollouts hold one
stream open at once, each with its own URL and number; no stream ends before all have begun. It prints the seconds.
"""

import asyncio
import json
import sys
import time
from itertools import count
from urllib.parse import urlsplit

from benchmarks.null_engine import TOKENS, wish

_LAST_CHUNK = b"0\r\n\r\n"


class Client(asyncio.Protocol):
    """One connection. `call` returns the raw response: head and body, with the lengths of chunks."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    @property
    def is_open(self) -> bool:
        return not self._transport.is_closing()

    async def call(self, request: bytes) -> bytes:
        self._received = b""
        self._answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._answer

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, end, body = self._received.partition(b"\r\n\r\n")
        if not end:
            return
        _, found, length = head.lower().partition(b"content-length:")
        whole = len(body) >= int(length.split(b"\r\n", 1)[0]) if found else body.endswith(_LAST_CHUNK)
        if whole and not self._answer.done():
            self._answer.set_result(self._received)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._answer.done():
            self._answer.set_exception(ConnectionError(f"the server hung up after {self._received[:200]!r}"))


def request(path: str, number: int, delay_ms: int, *, stream: bool, together: int = 1) -> bytes:
    message = {"role": "user", "content": wish(number, delay_ms, together)}
    body = {"model": "null", "messages": [message], "stream": stream}
    data = json.dumps(body).encode()
    head = f"POST {path}/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    head += "authorization: Bearer none\r\n"
    return f"{head}content-length: {len(data)}\r\n\r\n".encode() + data


async def load(url: str, clients: int, calls: int, delay_ms: int, *, stream: bool) -> dict[str, float]:
    """Make `calls` calls with `clients` clients at once. Each client first makes one call that is not measured."""
    parts, numbers, latencies = urlsplit(url), count(), list[float]()
    assert parts.hostname is not None and parts.port is not None
    host, port = parts.hostname, parts.port
    ready = asyncio.Barrier(clients)
    started: list[float] = []

    async def run(place: int) -> None:
        _, client = await asyncio.get_running_loop().create_connection(Client, host, port)
        _check(await client.call(request(parts.path, 0, delay_ms, stream=stream)))
        await ready.wait()
        started.append(time.perf_counter())
        await asyncio.sleep(delay_ms / 1000 * place / clients)  # Out of step, as real agents are.
        while next(numbers) < calls:
            begin = time.perf_counter()
            answer = await client.call(request(parts.path, 0, delay_ms, stream=stream))
            latencies.append(time.perf_counter() - begin)
            _check(answer)

    await asyncio.gather(*map(run, range(clients)))
    took_s = time.perf_counter() - min(started)
    latencies.sort()
    at = {name: latencies[int(len(latencies) * share)] * 1000 for name, share in (("p50", 0.5), ("p99", 0.99))}
    return at | {"calls_per_s": len(latencies) / took_s}


async def hold(url: str, rollouts: int, wave: int, delay_ms: int) -> dict[str, float]:
    """Stream one answer per rollout, all at once. Call `wave` of rollout r asks for the ids of `number(r, wave)`."""
    parts = urlsplit(url)
    host, port = parts.hostname, parts.port
    assert host is not None and port is not None
    ready, begin = asyncio.Barrier(rollouts), time.perf_counter()

    async def run(place: int) -> None:
        transport, client = await asyncio.get_running_loop().create_connection(Client, host, port)
        await ready.wait()
        path = f"/rollout/r{place}/attempt/a{parts.path}"
        asked = request(path, number(place, wave), delay_ms, stream=True, together=rollouts)
        answer = await client.call(asked)
        transport.close()
        _check(answer)
        if answer.count(b"word ") != TOKENS or b"[DONE]" not in answer:
            raise ValueError(f"rollout {place}: the stream is incomplete; it ends with {answer[-300:]!r}")

    await asyncio.gather(*map(run, range(rollouts)))
    return {"wave": wave, "seconds": time.perf_counter() - begin}


def number(rollout: int, wave: int) -> int:
    return rollout * 1000 + wave * 20


def _check(answer: bytes) -> None:
    if not answer.startswith(b"HTTP/1.1 200"):
        raise ValueError(f"got {answer[:500]!r}, expected a response with status 200")


async def _main(url: str, clients: int, calls: int, delay_ms: int, kind: str) -> dict[str, float]:
    if kind == "rollout":
        return await hold(url, clients, calls, delay_ms)
    return await load(url, clients, calls, delay_ms, stream=kind == "stream")


if __name__ == "__main__":
    url, *numbers, kind = sys.argv[1:]
    clients, calls, delay_ms = map(int, numbers)
    print(json.dumps(asyncio.run(_main(url, clients, calls, delay_ms, kind))))
