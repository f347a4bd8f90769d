"""One address in front of several servers: forwards each TCP connection to the next server that accepts it.

python -m benchmarks.address PORT SERVER_PORT...
"""

import asyncio
import contextlib
import sys
from itertools import cycle, islice

_PIECE = 2**16


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while piece := await reader.read(_PIECE):
            writer.write(piece)
            await writer.drain()
    writer.close()


async def _serve(port: int, servers: list[int]) -> None:
    turns = cycle(servers)

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for server in islice(turns, len(servers)):
            with contextlib.suppress(OSError):
                there = await asyncio.open_connection("127.0.0.1", server)
                await asyncio.gather(_pump(reader, there[1]), _pump(there[0], writer))
                return
        writer.close()

    async with await asyncio.start_server(forward, "127.0.0.1", port, backlog=2048) as listening:
        await listening.serve_forever()


if __name__ == "__main__":
    first, *others = map(int, sys.argv[1:])
    asyncio.run(_serve(first, others))
