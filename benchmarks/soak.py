"""Memory of `agl serve` during long work: calls of conversations at a steady rate, each with its agent's span.

    python -m benchmarks.soak MINUTES CALLS_PER_S

Each rollout makes four calls, each with all messages of the one before, every second one streamed. Prints a Markdown
row for each minute: the memory that only this process has (RssAnon), all of it (with pages of files), and latencies.
Then the growth in the second half, as the slope of a line through the measurements of each second.
"""

import asyncio
import json
import sys
import tempfile
import time
from itertools import count
from pathlib import Path
from urllib.parse import urlsplit

from agl import otlp
from agl.collector.http import PROTOBUF
from benchmarks.background import running_beside
from benchmarks.http_load import Client
from benchmarks.null_engine import wish
from benchmarks.process import Memory, growth, memory_mb
from tests.ports import free_port
from tests.store.serving import serving
from tests.store.spans import make_span

TURNS = 4
DELAY_MS = 100


class Soak:
    """The load on the server `pid`, and what was measured each second: seconds and memory."""

    def __init__(self, pid: int, gateway: str, receiver: str, calls_per_s: float) -> None:
        self._pid = pid
        self._gateway, self._receiver = urlsplit(gateway), urlsplit(receiver)
        self._calls_per_s = calls_per_s
        self._idle: dict[str, list[Client]] = {gateway: [], receiver: []}
        self._latencies_s: list[float] = []
        self.measured: list[tuple[float, Memory]] = []
        self.calls = 0

    async def run(self, minutes: float) -> None:
        begin = time.monotonic()
        rows = asyncio.create_task(self._show(begin))
        async with asyncio.TaskGroup() as calls:
            for number in count():
                due = begin + number / self._calls_per_s
                if due > begin + 60 * minutes:
                    break
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                calls.create_task(self._call(number))
        rows.cancel()

    async def _call(self, number: int) -> None:
        """Turn after turn of as many rollouts as calls are made in a second, so that their turns are a second apart."""
        wave, place = divmod(number, int(self._calls_per_s))
        rollout, turn = f"r{wave // TURNS}-{place}", wave % TURNS
        texts = [wish(0, DELAY_MS), *(f"{rollout}, turn {n}: {'some words ' * 40}" for n in range(2 * turn))]
        roles = ("user", "assistant")
        messages = [{"role": roles[place % 2], "content": text} for place, text in enumerate(texts)]
        body = json.dumps({"model": "null", "messages": messages, "stream": number % 2 == 0}).encode()
        began = time.monotonic()
        await self._post(self._gateway.geturl(), f"/rollout/{rollout}/attempt/a/v1/chat/completions", body)
        self._latencies_s.append(time.monotonic() - began)
        span = otlp.encode([make_span(number + 1, rollout=rollout, text="x" * 500)])
        await self._post(self._receiver.geturl(), self._receiver.path, span, PROTOBUF)
        self.calls += 1

    async def _post(self, url: str, path: str, body: bytes, content_type: str = "application/json") -> None:
        idle, parts = self._idle[url], urlsplit(url)
        while idle and not idle[-1].is_open:
            idle.pop()
        if idle:
            client = idle.pop()
        else:
            assert parts.hostname is not None and parts.port is not None
            loop = asyncio.get_running_loop()
            _, client = await loop.create_connection(Client, parts.hostname, parts.port)
        head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: {content_type}\r\ncontent-length: {len(body)}"
        answer = await client.call(f"{head}\r\n\r\n".encode() + body)
        assert answer.startswith(b"HTTP/1.1 200"), answer[:500]
        idle.append(client)

    async def _show(self, begin: float) -> None:
        print("| minute | calls | MB of its own | MB | p50, ms | p99, ms |\n|---:|---:|---:|---:|---:|---:|")
        minute = 0
        while True:
            await asyncio.sleep(1)
            memory = memory_mb(self._pid)
            self.measured.append((time.monotonic() - begin, memory))
            if self.measured[-1][0] >= 60 * (minute + 1):
                minute = int(self.measured[-1][0] / 60)
                latencies, self._latencies_s = sorted(self._latencies_s), []
                at = (latencies[int(len(latencies) * share)] * 1000 for share in (0.5, 0.99))
                row = (f"{memory.own:.1f}", f"{memory.whole:.1f}", *(f"{value:.0f}" for value in at))
                print(f"| {minute} | {self.calls} | {' | '.join(row)} |", flush=True)


def main(minutes: float, calls_per_s: float) -> None:
    engine = free_port()
    with (
        tempfile.TemporaryDirectory() as folder,
        running_beside([[sys.executable, "-m", "benchmarks.null_engine", str(engine)]]),
    ):
        port, upstream = free_port(), f"http://127.0.0.1:{engine}/v1"
        with serving(f"sqlite:///{folder}/agl.db", "--port", str(port), "--upstream", upstream) as (process, receiver):
            soak = Soak(process.pid, f"http://127.0.0.1:{port}", receiver, calls_per_s)
            asyncio.run(soak.run(minutes))
            size_mb = (Path(folder) / "agl.db").stat().st_size / 2**20
    grown = growth(soak.measured)
    print(
        f"\n{soak.calls} calls, {size_mb:.0f} MB in the store; growth in the second half: {grown.own:+.2f} MB of its "
    )
    print(f"own and {grown.whole:+.2f} MB in all per minute")


if __name__ == "__main__":
    main(*map(float, sys.argv[1:]))
