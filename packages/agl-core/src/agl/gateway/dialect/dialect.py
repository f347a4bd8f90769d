"""What a dialect does with one call: the request as the engine reads it, the answer as the client does."""

from typing import ClassVar, Protocol

from starlette.responses import Response

from agl.server.api_error import ApiError
from agl.tokens.capture import Json


class Dialect(Protocol):
    """One call in the client's API. What renders is told of each part of the answer once, in its order."""

    operation: ClassVar[str]
    path: ClassVar[str]
    """Below the engine's base URL."""

    is_native: ClassVar[bool]
    """Whether engines are asked in it; else the request is translated."""

    request: Json
    """What the engine is asked."""

    def __init__(self, body: Json, model: str | None) -> None:
        """Read the client's request; `model` is the name by which engines know the one it asks for.

        Raises ApiError for what cannot be asked of an engine.
        """

    def whole(self, raw: bytes, answer: Json) -> bytes:
        """The body for the client; `raw` is the engine's, `answer` the same as JSON, which may be changed."""
        ...

    def chunk(self, event: bytes, chunk: Json) -> bytes:
        """The events for the client, maybe none; `event` is the engine's, `chunk` its data, which may be changed."""
        ...

    def end(self, done: bytes) -> bytes:
        """What ends the stream; `done` is the event by which the engine did, empty where it just stopped."""
        ...

    def error(self, refusal: ApiError) -> bytes:
        """The event that ends a stream that fails."""
        ...

    @classmethod
    def refusal(cls, refusal: ApiError) -> Response:
        """The answer to a call that fails before anything of it was sent."""
        ...

    def refused(self, raw: bytes, status: int) -> bytes:
        """The body of an error that the engine answered."""
        ...
