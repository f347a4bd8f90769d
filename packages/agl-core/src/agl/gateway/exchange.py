"""One call from the client's request to the end of its response, which is sent only after the call is recorded."""

import asyncio
import json
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import aiohttp
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from agl import semconv
from agl.config import GatewayConfig
from agl.errors import AglError, OtlpError
from agl.gateway.arms import Arms
from agl.gateway.conversation import Conversations, conversation_key
from agl.gateway.dialect.dialect import DONE, Dialect, EventSplitter, event_data
from agl.gateway.dispatch import Dispatch, Routes
from agl.gateway.drift_kind import find_drift
from agl.gateway.engine import EVENT_STREAM, UpstreamResponse, forwarded
from agl.gateway.exact_prefix import exact_prompt
from agl.gateway.record import CallMetrics, CallRecord, Recorder
from agl.gateway.request import (
    CallerLookup,
    Seeds,
    changes,
    constraints,
    prepare,
    read_json,
    shaping,
    with_full_distribution,
)
from agl.server.api_error import ApiError, error_in, error_text
from agl.server.receiving import (
    ENCODINGS,
    IDENTITY,
    MemoryBudget,
    Reservation,
    check_json,
    decode_body,
    long_work,
    peer_of,
    read_body,
    run_while_connected,
)
from agl.span import Span
from agl.store.span_row import rows_of
from agl.tokens.capture import Capture, Json, requested_choices
from agl.tokens.packing import unpack_ids

logger = logging.getLogger(__name__)

NOT_RECORDED_HEADER: Final = "x-agl-recorded"
_LONGEST_DONE: Final = 64
"""Bytes of the event `[DONE]`, with whatever an engine writes around it."""
_NOT_RECORDED_EVENT: Final = b": the call could not be recorded\n\n"
"""A comment, which clients skip."""
_TOKENS_REFUSED: Final = frozenset({400, 422})
"""Statuses of an engine that takes no token ids, or not so many: an exact prompt keeps the thoughts of all turns."""
_TOKENS_IGNORED: Final = "the engine takes no tokens in a chat"


@dataclass(slots=True)
class GatewayParts:
    """What all calls of a gateway share; `session` and `recorder` exist while the app runs."""

    config: GatewayConfig
    overrides: Mapping[str, Mapping[str, Any]]
    callers: CallerLookup
    routes: Routes
    dispatch: Dispatch
    arms: Arms
    budget: MemoryBudget
    """For the bodies of calls, until the calls end."""
    seeds: Seeds = field(default_factory=Seeds)
    conversations: Conversations = field(default_factory=Conversations)
    metrics: CallMetrics = field(default_factory=CallMetrics)
    session: aiohttp.ClientSession = field(init=False)
    recorder: Recorder = field(init=False)

    async def read_body(self, scope: Scope, receive: Receive, reservation: Reservation) -> bytes:
        """The plain body of a request. Raises ApiError."""
        body = await read_body(scope, receive, reservation)
        encoding = Headers(scope=scope).get("content-encoding", IDENTITY).strip().lower()
        if encoding == IDENTITY:
            await long_work(len(body), check_json, body, reservation)
            return body
        if encoding not in ENCODINGS:
            message = f"the request has the content encoding {encoding!r}, expected one of {', '.join(ENCODINGS)}"
            raise ApiError(415, "unknown_encoding", message)
        try:
            plain = await asyncio.to_thread(
                decode_body, body, encoding, lambda size: reservation.grow_to(len(body) + size, size)
            )
        except ValueError as error:
            raise ApiError(400, "invalid_encoding", str(error)) from error
        await long_work(len(plain), check_json, plain, reservation)
        return plain


class CallEndpoint:
    """ASGI endpoint of one dialect."""

    def __init__(self, parts: GatewayParts, dialect: type[Dialect]) -> None:
        self._parts = parts
        self._dialect = dialect

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with Reservation(self._parts.budget, peer_of(scope)) as reservation:
                body = await self._parts.read_body(scope, receive, reservation)
                exchange = await self._open(Request(scope, receive), body, send)
                await run_while_connected(receive, exchange.run(scope, receive))
        except ClientDisconnect:
            return
        except AglError as error:
            await self._dialect.error_response(ApiError.of(error))(scope, receive, send)

    async def _open(self, request: Request, data: bytes, send: Send) -> "Exchange":
        """Read the request and prepare the engine's. Raises ApiError for a request that cannot be sent."""
        parts, kind, size = self._parts, self._dialect, len(data)
        text, body = await long_work(size, read_json, data)
        model = body["model"] if isinstance(body.get("model"), str) else None
        caller = await parts.callers.identify(request)
        arm = await parts.arms.arm(caller, body)
        engine_model = model and parts.routes.resolve(model, arm.versions if arm else {}, caller.pinned)
        dialect = await long_work(size, kind, body, engine_model)
        engine_kind = parts.routes.kind(engine_model or "")
        forced = parts.overrides.get(caller.mode or "prod", {})
        declared = shaping(forced)
        sent = prepare(
            dialect.request,
            dialect.requested,
            capture=engine_kind.capture_fields[kind.operation],
            extra_body=parts.config.extra_body,
            forced=forced,
            seed=parts.seeds.next(caller),
        )
        if caller.mode == "train":
            sent = with_full_distribution(sent, engine_kind, parts.config.extra_body, declared)
        record = CallRecord(
            caller,
            kind.operation,
            path=kind.path,
            headers=forwarded(request.headers),
            policy=parts.routes.policy(model or ""),
            engine_model=engine_model or "",
            sent=sent,
            client_body=text,
            model=model,
            changed=changes(body, sent) if kind.is_native else changes({}, sent),
            constraints=constraints(sent, engine_kind, declared),
            sampling=declared,
            canary=arm.attributes(parts.routes.policy(model), engine_model) if arm and model and engine_model else {},
            capture=dialect.capture,
        )
        await long_work(size, record.check)
        dialect.capture.expected_choices, dialect.capture.echoes = requested_choices(sent), bool(sent.get("echo"))
        key = conversation_key(
            caller.project, caller.rollout_id, caller.attempt_id, caller.trace_id, engine_model or ""
        )
        if key is not None and kind.operation == semconv.OPERATION_CHAT:
            agent = caller.role, caller.parent_id
            record.position = await long_work(size, parts.conversations.locate, key, sent, agent)
        return Exchange(parts, dialect, record, send, size)


class Exchange:
    """Sends a call to an engine, relays the response in the client's dialect, and records the call before its end."""

    def __init__(self, parts: GatewayParts, dialect: Dialect, record: CallRecord, send: Send, size: int) -> None:
        self._size = size
        """Bytes of the request, and of the response so far."""
        self._parts = parts
        self._dialect = dialect
        self._record = record
        self._send = send
        self._streaming = False

    async def run(self, scope: Scope, receive: Receive) -> None:
        """Every call is recorded once, whatever its outcome; only one that met a paused gateway is not.

        If `run` is cancelled, the engine's request is closed and the tokens sampled so far are recorded.
        """
        record = self._record
        try:
            ending = await self._sample()
        except ApiError as error:
            if error.code == "paused":  # The call reached no engine, and the client repeats it.
                return await self._fail(error)(scope, receive, self._send)
            ending = self._fail(error)
        except asyncio.CancelledError:
            record.fail("cancelled", "the client left before the answer was complete, or read nothing for send_s")
            await self._commit()
            raise
        if not_recorded := await self._commit():
            closed = self._parts.config.record == "closed"
            ending = self._fail(not_recorded) if closed else self._mark_unrecorded(ending)
        await ending(scope, receive, self._send)

    async def _sample(self) -> ASGIApp:
        """Relay the response up to its end; returns the app that sends the end. Raises ApiError if the engine fails."""
        parts, record = self._parts, self._record
        record.engine = parts.dispatch.choose_engine(record)
        prompt = await exact_prompt(parts.session, record) if parts.config.exact_prefix else None
        ending = None
        if prompt is not None:
            ending = await self._ask(record.engine.kind.with_prompt(record.sent, unpack_ids(prompt)), _TOKENS_REFUSED)
        if ending is None:
            prompt = None
            ending = await self._ask(record.sent)
        assert ending is not None
        await self._compare_prompt(prompt)
        return ending

    async def _ask(self, body: Json, refusals: Collection[int] = ()) -> ASGIApp | None:
        """Send `body` and relay the response; None if its status is one of `refusals`."""
        parts, record = self._parts, self._record
        record.body = await long_work(self._size, lambda: json.dumps(body).encode())
        async with parts.dispatch.response(parts.session, record) as response:
            if response.status in refusals:
                record.prefix = f"the engine refused the tokens: {response.error_message()}"
                return None
            record.http_status = response.status
            return await self._relay_stream(response) if response.is_stream else await self._relay_whole(response)

    async def _relay_whole(self, response: UpstreamResponse) -> Response:
        self._size += len(response.body)
        headers = forwarded(response.headers)
        if response.status < 400:
            if self._dialect.streams and not self._dialect.is_native:
                headers = {name: value for name, value in headers.items() if name.lower() != "content-type"}
                headers["content-type"] = EVENT_STREAM
            body = await long_work(self._size, self._read, self._take_whole, response.body)
        else:
            self._record.fail(str(response.status), response.error_message())
            body = self._dialect.engine_error(response.body, response.status)
        return Response(body, response.status, headers)

    async def _relay_stream(self, response: UpstreamResponse) -> ASGIApp:
        """Send events as they arrive, except the last."""
        if not self._dialect.streams and not self._dialect.is_native:
            raise self._engine_error("is a stream, which was not requested")
        self._streaming = True
        await self._send(_response_start(response))
        splitter = EventSplitter()
        async for piece in response.pieces():
            if done := await self._relay_events(splitter.split(piece)):
                await response.finish()
                return await long_work(self._size, self._end_stream, done)
        done = await self._relay_events([splitter.rest])
        return await long_work(self._size, self._end_stream, done)

    async def _relay_events(self, events: list[bytes]) -> bytes:
        """Send the events in the client's dialect. Returns the one that ends the stream; empty if none does."""
        size = sum(map(len, events))
        self._size += size
        if relayed := await long_work(size, lambda: b"".join(map(self._relay_event, events))):
            await self._send(_response_body(relayed, more=True))
        return next((event for event in events if len(event) <= _LONGEST_DONE and event_data(event) == DONE), b"")

    def _relay_event(self, event: bytes) -> bytes:
        """The event in the client's dialect; empty if nothing of it is for the client, or it ends the stream."""
        data = event_data(event)
        if data == DONE or not event:
            return b""
        if b"event: error" in event.splitlines():
            raise error_in({"error": error_text(data)}) or self._engine_error("is an error")
        return self._read(self._take_chunk, event, data) if data else event + b"\n\n"

    def _take_chunk(self, event: bytes, data: bytes) -> bytes:
        """Capture a chunk, and render it for the client."""
        chunk: Any = json.loads(data)
        self._record.add(chunk, is_whole=False)
        return self._dialect.render_chunk(event, chunk)

    def _take_whole(self, body: bytes) -> bytes:
        """Capture a whole response, and render it for the client."""
        response: Any = json.loads(body)
        self._record.add(response, is_whole=True)
        self._check_whole()
        return self._dialect.render_whole(body, response)

    def _end_stream(self, done: bytes) -> ASGIApp:
        self._check_whole()
        return _StreamEnd(self._read(self._dialect.render_end, done))

    def _read(self, reader: Callable[..., bytes], *parts: bytes) -> bytes:
        """`reader(*parts)`. Raises ApiError for parts of a response that have a wrong form."""
        try:
            return reader(*parts)
        except (ValueError, TypeError, AttributeError, KeyError, IndexError, RecursionError) as error:
            raise self._engine_error(f"is not an OpenAI response: {type(error).__name__}: {error}") from error

    def _check_whole(self) -> None:
        """Raises ApiError for a response that has ended and does not state that its answer is whole."""
        if reason := self._record.capture.end():
            raise self._engine_error(f"is not a whole answer: {reason}")

    def _engine_error(self, fault: str) -> ApiError:
        url = self._record.engine and self._record.engine.url
        return ApiError(502, "engine_error", f"the response of the engine at {url} {fault}")

    async def _compare_prompt(self, exact: bytes | None) -> None:
        """Record whether the engine used the `exact` prompt, and how the prompt drifted from the sampled tokens."""
        record, position = self._record, self._record.position
        choices = record.capture.choices()
        if position is None or not choices or not choices[0].prompt_ids:
            return
        try:
            prompt = await long_work(self._size, choices[0].packed_prompt_ids)
        except ValueError:  # Not token ids.
            return
        if exact is not None and not prompt.startswith(exact):
            record.prefix = _TOKENS_IGNORED
        if position.previous is not None:
            record.drifted = await find_drift(self._parts.session, record, position, position.previous, prompt)

    async def _commit(self) -> ApiError | None:
        """Commit the call's spans; returns an error for the client if the response cannot be passed on for it.

        A response with values that no span can hold, for example text that is not Unicode, is a failure of the engine,
        and recorded without these values.
        """
        record, failure = self._record, None
        try:
            try:
                spans = await self._commit_spans()
            except (OtlpError, ValueError, TypeError, OverflowError) as error:
                failure = self._engine_error(f"cannot be recorded: {error}")
                record.fail(failure.code, str(failure))
                record.capture = Capture()
                spans = await self._commit_spans()
        except (AglError, ValueError, TypeError, OverflowError) as error:
            logger.error("a call could not be recorded (gateway.record: %s): %s", self._parts.config.record, error)
            return ApiError(500, "not_recorded", f"the call could not be recorded, its answer is withheld: {error}")
        record.note_committed()
        await self._parts.arms.prove(spans)
        if record.position is not None and not record.error_type:
            self._parts.conversations.remember(record.position, record.capture.choices(), spans)
        return failure

    async def _commit_spans(self) -> list[Span]:
        spans = await long_work(self._size, self._record.spans, self._parts.config.content_max_bytes)
        rows = await long_work(self._size, lambda: [row for span in spans for row in rows_of(span)])
        await self._parts.recorder.commit(rows, self._record.caller.project)
        self._parts.metrics.count(self._record, spans)
        return spans

    def _fail(self, error: ApiError) -> ASGIApp:
        """Record `error` and return the end of the response that reports it."""
        dialect, record = self._dialect, self._record
        record.fail(error.code, str(error))
        if self._streaming:
            return _StreamEnd(dialect.render_error(error))
        record.http_status = error.http_status
        return dialect.error_response(error)

    def _mark_unrecorded(self, ending: ASGIApp) -> ASGIApp:
        """`ending` with a header, or a comment in the stream, for a call that is not recorded."""
        if isinstance(ending, _StreamEnd):
            return _StreamEnd(_NOT_RECORDED_EVENT + ending.body)
        if isinstance(ending, Response):
            ending.headers[NOT_RECORDED_HEADER] = "false"
        return ending


class _StreamEnd:
    """ASGI app that ends a stream with `body`."""

    def __init__(self, body: bytes) -> None:
        self.body = body

    async def __call__(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        await send(_response_body(self.body, more=False))


def _response_start(response: UpstreamResponse) -> Message:
    headers = [(name.lower().encode(), value.encode("latin-1")) for name, value in forwarded(response.headers).items()]
    return {"type": "http.response.start", "status": response.status, "headers": headers}


def _response_body(body: bytes, *, more: bool) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": more}
