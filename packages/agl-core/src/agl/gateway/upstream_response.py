"""An engine's answer while it arrives, each hop of it within its time."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from typing import Final, Self

import aiohttp

from agl.config import TimeoutsConfig
from agl.server.api_error import ApiError, error_message
from agl.tokens.capture import Json

_EVENT_STREAM: Final = "text/event-stream"
_FINISH_S: Final = 0.5
_NOT_FORWARDED: Final = frozenset(
    {"host", "content-length", "transfer-encoding", "connection", "keep-alive", "te", "trailer", "upgrade", "expect"}
    | {"accept-encoding", "content-encoding", "date", "server", "proxy-authorization", "proxy-authenticate"}
    | {"set-cookie"}
)
"""Headers that belong to one hop, or to a body that we write anew."""


class Answer:
    """Status, headers and body of an answer of the engine at `url`.

    `body` is all of it; of a stream the first piece, and `pieces` yields what follows.
    """

    def __init__(self, url: str, response: aiohttp.ClientResponse, timeouts: TimeoutsConfig, deadline: float) -> None:
        self.url = url
        self.status = response.status
        self.headers = response.headers
        self.is_stream = response.content_type == _EVENT_STREAM
        self.body = b""
        self._response = response
        self._timeouts = timeouts
        self._deadline = deadline

    @classmethod
    async def open(
        cls,
        session: aiohttp.ClientSession,
        url: str,
        path: str,
        body: bytes,
        headers: Mapping[str, str],
        timeouts: TimeoutsConfig,
        deadline: float,
    ) -> Self:
        """Ask for `path` below `url`, and wait for the first byte (not streaming: for all).

        `deadline` is when it has to be over, by the event loop's clock. Raises ApiError when the engine fails.
        """
        now = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout_at(min(deadline, now + timeouts.first_byte_s)):
                response = await session.post(url + path, data=body, headers=headers, allow_redirects=False)
                answer = cls(url, response, timeouts, deadline)
                try:
                    answer.body = await (response.content.readany() if answer.is_stream else response.read())
                except BaseException:
                    response.close()
                    raise
        except aiohttp.ConnectionTimeoutError as error:
            raise _unreachable(url) from error
        except (aiohttp.ClientError, TimeoutError) as error:
            raise engine_failure(error, url, f"first_byte_s: {timeouts.first_byte_s:g}") from error
        if 300 <= answer.status < 400:
            raise ApiError(502, "engine_redirects", f"the engine at {url} redirects; redirects are not followed")
        return answer

    async def pieces(self) -> AsyncIterator[bytes]:
        """What has come of the stream, piece by piece. Raises ApiError when the engine breaks off or stops sending."""
        yield self.body
        content, loop = self._response.content, asyncio.get_running_loop()
        limit = ""
        try:
            while not content.at_eof():
                until, limit = self._next_deadline(loop.time())
                async with asyncio.timeout_at(until):
                    piece = await content.readany()
                if piece:
                    yield piece
        except (aiohttp.ClientError, TimeoutError) as error:
            raise engine_failure(error, self.url, limit) from error

    def _next_deadline(self, now: float) -> tuple[float, str]:
        """When the next piece has to be there, and the setting that says so."""
        times = self._timeouts
        chunk = (now + times.chunk_s, f"chunk_s: {times.chunk_s:g}")
        return min(chunk, (self._deadline, f"total_s: {times.total_s:g}"))

    async def finish(self) -> None:
        """Read what still comes after the last event, which is next to nothing, so that the connection is kept."""
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            async with asyncio.timeout(_FINISH_S):
                while not self._response.content.at_eof():
                    await self._response.content.readany()

    def close(self) -> None:
        """Hang up where the stream has not ended: the engine stops sampling. Else the connection is kept."""
        if self._response.content.at_eof():
            self._response.release()
        else:
            self._response.close()

    def error_message(self) -> str:
        """What an error body says."""
        try:
            body: Json = json.loads(self.body)
            return error_message(body["error"])
        except (ValueError, TypeError, KeyError):
            return self.body[:1000].decode(errors="replace")


def forwarded(headers: Mapping[str, str]) -> dict[str, str]:
    """Headers that go on to the other side."""
    return {name: value for name, value in headers.items() if name.lower() not in _NOT_FORWARDED}


def engine_failure(error: Exception, url: str, limit: str) -> ApiError:
    """How an engine that cannot be talked to is told to the client; `limit` is the timeout that was waited for."""
    if isinstance(error, TimeoutError):
        return ApiError(504, "engine_timeout", f"the engine at {url} did not answer in time (gateway.timeouts.{limit})")
    if isinstance(error, aiohttp.ClientConnectorError):
        return _unreachable(url)
    return ApiError(502, "engine_error", f"the engine at {url} broke off: {error or type(error).__name__}")


def _unreachable(url: str) -> ApiError:
    return ApiError(503, "engine_unreachable", f"no engine answers at {url}; is it running?")
