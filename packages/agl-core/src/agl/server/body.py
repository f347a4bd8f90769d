"""What arrives from a client after the head of its request: the body, within a limit, and the disconnect."""

import asyncio
from collections.abc import Awaitable, Callable

from starlette.requests import ClientDisconnect
from starlette.types import Receive


async def read_body(receive: Receive, check_size: Callable[[int], None]) -> bytes:
    """The whole body of an HTTP request.

    `check_size` gets the number of bytes received so far after each piece; what it raises ends the reading. Raises
    ClientDisconnect when the client leaves before the body is complete.
    """
    pieces: list[bytes] = []
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        piece, more = message.get("body", b""), message.get("more_body", False)
        size += len(piece)
        check_size(size)
        pieces.append(piece)
    return b"".join(pieces)


async def run_while_connected(receive: Receive, work: Awaitable[None]) -> None:
    """Await `work`, in this task, and cancel it when the client disconnects; the body has been read."""
    task, disconnected = asyncio.current_task(), False
    assert task is not None

    def cancel(_: object) -> None:
        nonlocal disconnected
        disconnected = True
        task.cancel()

    watch = asyncio.create_task(_disconnect(receive))
    watch.add_done_callback(cancel)
    try:
        await work
    except asyncio.CancelledError:
        if not disconnected:
            raise
        task.uncancel()
    finally:
        watch.remove_done_callback(cancel)
        watch.cancel()


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
