"""One call on its way: to the engine, into the store, and only then to its end at the client."""

import asyncio
import json
import logging
from collections.abc import Mapping

import aiohttp
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from agl.capture import Asked, Json, says_nothing, strip
from agl.errors import AglError
from agl.gateway.record import Call, error_message
from agl.gateway.refusal import Refusal
from agl.gateway.wire import DONE, event_data, split_events, to_event
from agl.store import Store

logger = logging.getLogger(__name__)

_EVENT_STREAM = "text/event-stream"
_NOT_FORWARDED = frozenset(
    {"host", "content-length", "transfer-encoding", "connection", "keep-alive", "te", "trailer", "upgrade", "expect"}
    | {"accept-encoding", "content-encoding", "date", "server", "proxy-authorization", "proxy-authenticate"}
)
"""Headers that belong to one hop, or to a body that we write anew."""


class Exchange:
    """Forwards `call` to `url` and its answer to the client, recording it in between.

    A client that goes away cancels `run`; then the engine's request is closed, and what was sampled is recorded.
    """

    def __init__(
        self, call: Call, asked: Asked, *, session: aiohttp.ClientSession, store: Store, url: str, send: Send
    ) -> None:
        self._call = call
        self._asked = asked
        self._session = session
        self._store = store
        self._url = url
        self._send = send
        self._streaming = False

    async def run(self, headers: Mapping[str, str], scope: Scope, receive: Receive) -> None:
        """Sample, record, end the answer. Whatever happens, the call is recorded once."""
        try:
            ending = await self._sample(headers)
        except Refusal as refusal:
            self._call.fail(refusal.code, str(refusal))
            self._call.http_status = self._call.http_status or refusal.http_status
            ending = self._end_with(refusal)
        except asyncio.CancelledError:
            self._call.fail("cancelled", "the client went away before the answer was complete")
            await self._record()
            raise
        unrecorded = await self._record()
        await (self._end_with(unrecorded) if unrecorded else ending)(scope, receive, self._send)

    async def _sample(self, headers: Mapping[str, str]) -> ASGIApp:
        """Relay the answer up to its end; returns what sends the end. Raises Refusal when the engine fails."""
        body = json.dumps(self._call.sent).encode()
        try:
            async with self._session.post(
                self._url, data=body, headers=forwarded(headers), allow_redirects=False
            ) as answer:
                self._call.http_status = answer.status
                if answer.content_type == _EVENT_STREAM:
                    return await self._relay_events(answer)
                return self._relay_whole(await answer.read(), answer)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise engine_failure(error, self._call.upstream) from error

    def _relay_whole(self, body: bytes, answer: aiohttp.ClientResponse) -> Response:
        if answer.status < 400:
            data = self._take(body)
            if strip(data, self._asked):
                body = json.dumps(data, separators=(",", ":")).encode()
        else:
            self._call.fail(str(answer.status), _engine_message(body))
        return Response(body, answer.status, forwarded(answer.headers))

    async def _relay_events(self, answer: aiohttp.ClientResponse) -> ASGIApp:
        """Send events as they come. The one that ends the stream is left to be sent after recording."""
        self._streaming = True
        await self._send(_response_start(answer))
        rest = b""
        async for received in answer.content.iter_any():
            events, rest = split_events(rest + received)
            done = [event for event in events if event_data(event) == DONE]
            if relayed := b"".join(self._relay_event(event) for event in events):
                await self._send(_body(relayed, more=True))
            if done:
                return _last_body(done[0] + b"\n\n")
        return _last_body(self._relay_event(rest))

    def _relay_event(self, event: bytes) -> bytes:
        """The event as the client asked for it; empty where nothing of it is for the client, or it ends the stream."""
        data = event_data(event)
        if data == DONE or not event:
            return b""
        if not data:
            return event + b"\n\n"
        chunk = self._take(data)
        if not strip(chunk, self._asked):
            return event + b"\n\n"
        return b"" if says_nothing(chunk) else to_event(chunk)

    def _take(self, data: bytes) -> Json:
        """Read and capture a whole answer or a chunk."""
        try:
            answer = json.loads(data)
            self._call.answer(answer)
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise Refusal(
                502, "engine_error", f"the engine at {self._call.upstream} sent what is not an OpenAI answer: {error}"
            ) from error
        return answer

    async def _record(self) -> Refusal | None:
        """Write the call durably; a Refusal when that cannot be done, for then the client must not train on it."""
        try:
            await asyncio.to_thread(self._store.append_spans, self._call.spans())
        except (AglError, TypeError, OverflowError) as error:
            logger.error("a call was refused because it could not be recorded: %s", error)
            return Refusal(500, "not_recorded", f"the call could not be recorded, its answer is withheld: {error}")
        return None

    def _end_with(self, refusal: Refusal) -> ASGIApp:
        return _last_body(to_event(refusal.body())) if self._streaming else refusal.response()


def forwarded(headers: Mapping[str, str]) -> dict[str, str]:
    """Headers that go on to the other side."""
    return {name: value for name, value in headers.items() if name.lower() not in _NOT_FORWARDED}


def engine_failure(error: Exception, upstream: str) -> Refusal:
    """How an engine that cannot be talked to is told to the client."""
    if isinstance(error, TimeoutError):
        return Refusal(504, "engine_timeout", f"the engine at {upstream} did not answer in time")
    if isinstance(error, aiohttp.ClientConnectorError):
        return Refusal(503, "engine_unreachable", f"no engine answers at {upstream}; is it running?")
    return Refusal(502, "engine_error", f"the engine at {upstream} broke off: {error or type(error).__name__}")


def _engine_message(body: bytes) -> str:
    """What an error body of an engine says."""
    try:
        return error_message(json.loads(body)["error"])
    except (ValueError, TypeError, KeyError):
        return body[:1000].decode(errors="replace")


def _response_start(answer: aiohttp.ClientResponse) -> Message:
    headers = [(name.lower().encode(), value.encode("latin-1")) for name, value in forwarded(answer.headers).items()]
    return {"type": "http.response.start", "status": answer.status, "headers": headers}


def _body(body: bytes, *, more: bool) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": more}


def _last_body(body: bytes) -> ASGIApp:
    """What ends a stream with `body`."""

    async def end(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send(_body(body, more=False))

    return end
