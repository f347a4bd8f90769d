"""Reading a request body within a limit."""

from collections.abc import Callable

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
