"""One engine: its URL and key, the queue of calls for it, and its response as it arrives."""

import asyncio
import contextlib
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Final
from uuid import uuid4

import aiohttp

from agl.config import TimeoutsConfig, UpstreamConfig
from agl.gateway.engine_kind import ENGINE_KINDS
from agl.server.api_error import ApiError, error_text

_CREDENTIALS: Final = frozenset({"authorization", "x-api-key"})
USER_HEADER: Final = "x-agl-user"
_REQUEST_ID: Final = "x-request-id"
"""Engines make the id of a response of it."""
_IDS_OF_REQUESTS: Final = ("request-id", "requestid", "correlation-id", "call-id")
"""Ends of the names of such headers."""
EVENT_STREAM: Final = "text/event-stream"
_FINISH_S: Final = 0.5
_NOT_FORWARDED: Final = frozenset(
    {"host", "content-length", "transfer-encoding", "connection", "keep-alive", "te", "trailer", "upgrade", "expect"}
    | {"accept-encoding", "content-encoding", "date", "server", "proxy-authorization", "proxy-authenticate"}
    | {"proxy-connection", "cookie", "set-cookie", "api-key", "origin", USER_HEADER}
)
"""Headers that apply to one hop only, describe a body that the gateway rewrites, hold credentials for the gateway, or
are its to check or to use."""


class Engine:
    """The server at `config.url`; `url` is without user and password. Raises ConfigError if its key is not set."""

    def __init__(self, config: UpstreamConfig) -> None:
        self.url = config.base_url
        self.kind = ENGINE_KINDS[config.kind]
        self.queue = FairQueue(config.max_concurrent)
        self.is_reachable = True
        """False after a failed connection, until the engine responds or lists its models again."""
        self._models = frozenset(config.models)
        self._authorization = config.authorization()

    def serves(self, model: str) -> bool:
        """Whether the configuration lists `model` in any version for this engine; an empty list means all models."""
        return not self._models or model in self._models or model.partition("@")[0] in self._models

    def headers(self, client_headers: Mapping[str, str]) -> dict[str, str]:
        """`client_headers`, in which the engine's own credentials, if it has any, replace the client's.

        So does a new id of the request: with the id of another response, a client could claim that response.
        """
        replaced = _CREDENTIALS if self._authorization else ()
        kept = {name: value for name, value in client_headers.items() if name.lower() not in replaced}
        kept = {name: value for name, value in kept.items() if not name.lower().endswith(_IDS_OF_REQUESTS)}
        return kept | self._authorization | {_REQUEST_ID: uuid4().hex}

    async def post(
        self,
        session: aiohttp.ClientSession,
        path: str,
        body: bytes,
        client_headers: Mapping[str, str],
        timeouts: TimeoutsConfig,
        deadline: float,
    ) -> "UpstreamResponse":
        """Send a request and wait for the first byte of a stream, or for a whole response that is not streamed.

        `deadline`, by the event loop's clock, limits the whole call. Raises ApiError when the engine fails.
        """
        headers = self.headers(client_headers)
        try:
            async with asyncio.timeout_at(min(deadline, asyncio.get_running_loop().time() + timeouts.first_byte_s)):
                received = await session.post(self.url + path, data=body, headers=headers, allow_redirects=False)
                response = UpstreamResponse(self.url, received, timeouts, deadline)
                try:
                    response.body = await (received.content.readany() if response.is_stream else received.read())
                except BaseException:
                    received.close()
                    raise
        except (aiohttp.ClientError, TimeoutError) as error:
            failure = engine_failure(error, self.url, f"first_byte_s: {timeouts.first_byte_s:g}")
            self.is_reachable = self.is_reachable and failure.code != "engine_unreachable"
            raise failure from error
        if 300 <= response.status < 400:
            raise ApiError(502, "engine_redirects", f"the engine at {self.url} redirects; redirects are not followed")
        self.is_reachable = True
        return response


class UpstreamResponse:
    """A response of the engine at `url`. `body` is all of it, or a stream's first piece, which `pieces` continues."""

    def __init__(self, url: str, response: aiohttp.ClientResponse, timeouts: TimeoutsConfig, deadline: float) -> None:
        self.url = url
        self.status = response.status
        self.headers = response.headers
        self.is_stream = response.content_type == EVENT_STREAM
        self.body = b""
        self._response = response
        self._timeouts = timeouts
        self._deadline = deadline
        self._leave: Callable[[], None] = lambda: None

    async def pieces(self) -> AsyncIterator[bytes]:
        """The pieces of a stream as they arrive. Raises ApiError when the engine breaks off or stops sending."""
        yield self.body
        content, loop = self._response.content, asyncio.get_running_loop()
        setting = ""
        try:
            while not content.at_eof():
                until, setting = self._next_deadline(loop.time())
                async with asyncio.timeout_at(until):
                    piece = await content.readany()
                if piece:
                    yield piece
        except (aiohttp.ClientError, TimeoutError) as error:
            raise engine_failure(error, self.url, setting) from error

    def _next_deadline(self, now: float) -> tuple[float, str]:
        """Deadline for the next piece, and the timeout setting that it comes from."""
        timeouts = self._timeouts
        chunk = (now + timeouts.chunk_s, f"chunk_s: {timeouts.chunk_s:g}")
        return min(chunk, (self._deadline, f"total_s: {timeouts.total_s:g}"))

    async def finish(self) -> None:
        """Read the few bytes after the last event, so that the connection can be reused."""
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            async with asyncio.timeout(_FINISH_S):
                while not self._response.content.at_eof():
                    await self._response.content.readany()

    def on_end(self, leave: Callable[[], None]) -> None:
        """Call `leave` when the engine has sent everything, even if the client has not read it yet, or at `close`."""
        self._leave = leave
        self._response.content.on_eof(leave)

    def close(self) -> None:
        """Close the connection of an unfinished stream, so that the engine stops sampling; else reuse it."""
        if self._response.content.at_eof():
            self._response.release()
        else:
            self._response.close()
        self._leave()

    def error_message(self) -> str:
        """The message of an error body."""
        return error_text(self.body)


class FairQueue:
    """At most `limit` calls at once, in one event loop. Waiting rollouts take turns; the calls of each keep order."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.in_use = 0
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    @property
    def waiting(self) -> int:
        return sum(map(len, self._waiting.values()))

    async def acquire(self, rollout: str) -> None:
        """Wait for a slot for a call of `rollout`; `release` it afterwards."""
        if self.in_use < self.limit and not self._waiting:
            self.in_use += 1
            return
        slot: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(rollout, deque()).append(slot)
        try:
            await slot
        except asyncio.CancelledError:
            if slot.done() and not slot.cancelled():
                self.release()  # The slot was granted just before the cancellation.
            else:
                self._leave(rollout, slot)
            raise

    def release(self) -> None:
        """Grant the slot to the next rollout in turn."""
        while self._waiting:
            rollout, calls = self._waiting.popitem(last=False)
            slot = calls.popleft()
            if calls:
                self._waiting[rollout] = calls  # At the end of the line.
            if not slot.done():
                slot.set_result(None)
                return
        self.in_use -= 1

    def _leave(self, rollout: str, slot: asyncio.Future[None]) -> None:
        calls = self._waiting.get(rollout)
        if calls is not None and slot in calls:
            calls.remove(slot)
            if not calls:
                del self._waiting[rollout]


def forwarded(headers: Mapping[str, str]) -> dict[str, str]:
    """The headers that the gateway passes on, in either direction; those that `Connection` names end here too."""
    one_hop = ",".join(value for name, value in headers.items() if name.lower() == "connection")
    withheld = _NOT_FORWARDED | {name.strip().lower() for name in one_hop.split(",")}
    return {name: value for name, value in headers.items() if name.lower() not in withheld}


def engine_failure(error: Exception, url: str, setting: str) -> ApiError:
    """The client's error for a failed connection; `setting` is the timeout that applied, with its value."""
    if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
        return ApiError(503, "engine_unreachable", f"no engine answers at {url}; is it running?")
    if isinstance(error, TimeoutError):
        return ApiError(
            504, "engine_timeout", f"the engine at {url} did not answer in time (gateway.timeouts.{setting})"
        )
    return ApiError(502, "engine_error", f"the engine at {url} broke off: {error or type(error).__name__}")
