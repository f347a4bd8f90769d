"""One call on its way: to the engine, into the store, and only then to its end at the client."""

import asyncio
import json
import logging
from collections.abc import Callable
from typing import Any

import aiohttp
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from agl.config import RecordMode
from agl.errors import AglError
from agl.gateway.call import Call
from agl.gateway.continuation import Continuations
from agl.gateway.dialect import Dialect
from agl.gateway.dispatch import Dispatch
from agl.gateway.history import Place
from agl.gateway.recorder import Recorder
from agl.gateway.sse import DONE, NOT_RECORDED, event_data, split_events
from agl.gateway.upstream_response import Answer, forwarded
from agl.server.api_error import ApiError
from agl.tokens.capture import Json

logger = logging.getLogger(__name__)

NOT_RECORDED_HEADER = "x-agl-recorded"
_REFUSED = frozenset({400, 422})
"""Statuses of an engine that does not take tokens, or not so many: what was thought stays in an exact prompt."""


class Exchange:
    """Takes `call` to an engine and its answer to the client in `dialect`, recording it in between.

    A client that goes away cancels `run`; then the engine's request is closed, and what was sampled is recorded.
    """

    def __init__(
        self,
        call: Call,
        dialect: Dialect,
        *,
        place: Place | None,
        continuations: Continuations,
        dispatch: Dispatch,
        recorder: Recorder,
        mode: RecordMode,
        send: Send,
    ) -> None:
        self._call = call
        self._dialect = dialect
        self._place = place
        self._continuations = continuations
        self._dispatch = dispatch
        self._recorder = recorder
        self._mode = mode
        self._send = send
        self._streaming = False

    async def run(self, session: aiohttp.ClientSession, scope: Scope, receive: Receive) -> None:
        """Sample, record, end the answer. Whatever happens to a call that was let in, it is recorded once."""
        try:
            ending = await self._ask(session)
        except ApiError as refusal:
            if refusal.code == "paused":  # It has met no engine, and comes again.
                return await self._refuse(refusal)(scope, receive, self._send)
            self._call.fail(refusal.code, str(refusal))
            self._call.http_status = self._call.http_status or refusal.http_status
            ending = self._refuse(refusal)
        except asyncio.CancelledError:
            self._call.fail("cancelled", "the client went away before the answer was complete")
            await self._record()
            raise
        if unrecorded := await self._record():
            ending = self._refuse(unrecorded) if self._mode == "closed" else self._admit(ending)
        await ending(scope, receive, self._send)

    async def _ask(self, session: aiohttp.ClientSession) -> ASGIApp:
        """Have the call answered up to its end; returns what sends the end. Raises ApiError when the engine fails."""
        call, place = self._call, self._place
        if place is None:
            async with self._dispatch.answer(session, call.trip) as answer:
                return await self._relay(answer)
        engine = self._dispatch.engine_for(call.trip)
        prompt = await self._continuations.extend(session, call, place, engine)
        if prompt is not None:
            call.trip.body = json.dumps(engine.shape.with_prompt(call.sent, prompt)).encode()
        async with self._dispatch.answer(session, call.trip) as answer:
            refused = prompt is not None and answer.status in _REFUSED
            ending = None if refused else await self._relay(answer)
        if ending is None:
            call.prefix, prompt = f"the engine refused the tokens: {answer.error_message()}", None
            call.trip.body = json.dumps(call.sent).encode()
            async with self._dispatch.answer(session, call.trip) as answer:
                ending = await self._relay(answer)
        await self._continuations.compare(session, call, place, prompt)
        return ending

    async def _relay(self, answer: Answer) -> ASGIApp:
        """Relay the answer up to its end; returns what sends the end. Raises ApiError when the engine fails."""
        self._call.http_status = answer.status
        if answer.is_stream:
            return await self._relay_events(answer)
        return self._relay_whole(answer)

    def _relay_whole(self, answer: Answer) -> Response:
        if answer.status < 400:
            body = self._take(answer.body, lambda data: self._dialect.whole(answer.body, data))
        else:
            self._call.fail(str(answer.status), answer.error_message())
            body = self._dialect.refused(answer.body, answer.status)
        return Response(body, answer.status, forwarded(answer.headers))

    async def _relay_events(self, answer: Answer) -> ASGIApp:
        """Send events as they come. What ends the stream is left to be sent after recording."""
        self._streaming = True
        await self._send(_response_start(answer))
        rest = b""
        async for piece in answer.pieces():
            events, rest = split_events(rest + piece)
            done = [event for event in events if event_data(event) == DONE]
            if relayed := b"".join(self._relay_event(event) for event in events):
                await self._send(_body(relayed, more=True))
            if done:
                await answer.finish()
                return _LastBody(self._dialect.end(done[0]))
        return _LastBody(self._relay_event(rest) + self._dialect.end(b""))

    def _relay_event(self, event: bytes) -> bytes:
        """The event as the client asked for it; empty where nothing of it is for the client, or it ends the stream."""
        data = event_data(event)
        if data == DONE or not event:
            return b""
        if not data:
            return event + b"\n\n"
        return self._take(data, lambda chunk: self._dialect.chunk(event, chunk))

    def _take(self, data: bytes, render: Callable[[Json], bytes]) -> bytes:
        """Read and capture a whole answer or a chunk, and write it for the client."""
        try:
            answer: Any = json.loads(data)
            self._call.answer(answer)
            return render(answer)
        except (ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
            raise ApiError(
                502, "engine_error", f"the engine at {self._call.upstream} sent what is not an OpenAI answer: {error}"
            ) from error

    async def _record(self) -> ApiError | None:
        """Write the call durably; a ApiError that says why where that cannot be done."""
        spans = self._call.spans()
        try:
            await self._recorder.record(spans)
        except (AglError, TypeError, OverflowError) as error:
            logger.error("a call could not be recorded (gateway.record: %s): %s", self._mode, error)
            return ApiError(500, "not_recorded", f"the call could not be recorded, its answer is withheld: {error}")
        if self._place is not None:
            self._continuations.keep(self._call, self._place, spans)
        return None

    def _refuse(self, refusal: ApiError) -> ASGIApp:
        return _LastBody(self._dialect.error(refusal)) if self._streaming else self._dialect.refusal(refusal)

    def _admit(self, ending: ASGIApp) -> ASGIApp:
        """`ending`, saying that the call is not recorded: in a header, or in a comment of the stream."""
        if isinstance(ending, _LastBody):
            return _LastBody(NOT_RECORDED + ending.body)
        if isinstance(ending, Response):
            ending.headers[NOT_RECORDED_HEADER] = "false"
        return ending


def _response_start(answer: Answer) -> Message:
    headers = [(name.lower().encode(), value.encode("latin-1")) for name, value in forwarded(answer.headers).items()]
    return {"type": "http.response.start", "status": answer.status, "headers": headers}


def _body(body: bytes, *, more: bool) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": more}


class _LastBody:
    """ASGI app that ends a stream with `body`."""

    def __init__(self, body: bytes) -> None:
        self.body = body

    async def __call__(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        await send(_body(self.body, more=False))
