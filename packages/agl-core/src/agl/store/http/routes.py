"""The server's side: a route for each verb, and one for the OpenAPI document."""

import asyncio
import logging
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from agl.config import CollectorConfig
from agl.errors import AglError, StoreError
from agl.server.api_error import ApiError
from agl.server.body import read_body
from agl.server.memory_budget import MemoryBudget, Reservation
from agl.store.http.openapi import document
from agl.store.http.verb import ERRORS, INVALID, JSON, LONGEST_WAIT_S, PREFIX, PROTOBUF, UNAVAILABLE, VERBS, Verb
from agl.store.protocol import Store
from agl.store.rollout import Rollout

logger = logging.getLogger(__name__)

_VERBS_AT_ONCE: Final = 16
"""Requests that are in the store at once, each in a thread; it commits together what waits together."""
_WAITS_AT_ONCE: Final = 64
_SLICE_S: Final = 1.0
"""A wait is cut into slices: between them its thread is free for others, and a client that has left is noticed."""
_RETRY_AFTER_S: Final = 1


class Api:
    """Routes of the verbs of `store`, within the limits that `config` sets for what receivers hold in memory."""

    def __init__(self, store: Store, config: CollectorConfig | None = None) -> None:
        self._store = store
        self._config = config or CollectorConfig()
        self._budget = MemoryBudget(self._config.max_pending_bytes)
        self._pool = ThreadPoolExecutor(_VERBS_AT_ONCE, "agl-api")
        self._waiting = ThreadPoolExecutor(_WAITS_AT_ONCE, "agl-api-wait")

    def routes(self) -> list[BaseRoute]:
        routes: list[BaseRoute] = [
            Route(verb.path, self._endpoint(verb), methods=[verb.method]) for verb in VERBS.values()
        ]
        return [Route(f"{PREFIX}/openapi.json", _show_document), *routes]

    def close(self) -> None:
        """End the threads; requests under way are finished first. May be called twice."""
        self._pool.shutdown()
        self._waiting.shutdown()

    def _endpoint(self, verb: Verb) -> Any:
        async def answer(request: Request) -> Response:
            try:
                with Reservation(self._budget) as reservation:
                    return await self._answer(verb, request, reservation)
            except ClientDisconnect:
                return Response(status_code=400)  # Nobody reads it.
            except ApiError as refusal:
                return _refuse(refusal)

        return answer

    async def _answer(self, verb: Verb, request: Request, reservation: Reservation) -> Response:
        sent = dict(request.query_params) if verb.method == "GET" else await self._read_body(verb, request, reservation)
        if verb.waits:
            body = await self._wait(verb, _read(verb, sent), request)
        else:
            body = await asyncio.get_running_loop().run_in_executor(self._pool, self._perform, verb, sent)
        return Response(body, media_type=PROTOBUF if verb.returns_spans else JSON)

    async def _read_body(self, verb: Verb, request: Request, reservation: Reservation) -> bytes:
        given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if (
            given != verb.content_type
        ):  # Which also keeps web pages out: a browser asks before it sends these elsewhere.
            raise ApiError(415, "unknown_content_type", f"{verb.path} takes {verb.content_type}, got {given!r}")
        return await read_body(request.receive, lambda size: self._reserve(reservation, size))

    def _reserve(self, reservation: Reservation, size: int) -> None:
        limit = self._config.max_body_bytes
        if size > limit:
            raise ApiError(413, "too_large", f"the body is over {limit} bytes; send less at once")
        if not reservation.grow_to(size):
            raise ApiError(503, UNAVAILABLE, "too much is on its way to the store; send it again")

    def _perform(self, verb: Verb, sent: bytes | Mapping[str, str]) -> bytes:
        return verb.write_result(self._call(verb, _read(verb, sent)))

    def _call(self, verb: Verb, arguments: Mapping[str, Any]) -> Any:
        try:
            return getattr(self._store, verb.name)(**arguments)
        except StoreError as error:
            raise _refusal(error) from error

    async def _wait(self, verb: Verb, arguments: dict[str, Any], request: Request) -> bytes:
        asked_s = arguments.pop("timeout_s")
        deadline = time.monotonic() + (LONGEST_WAIT_S if asked_s is None else min(asked_s, LONGEST_WAIT_S))
        loop = asyncio.get_running_loop()
        while True:
            left_s = deadline - time.monotonic()
            limited = {**arguments, "timeout_s": min(left_s, _SLICE_S)}
            rollouts: list[Rollout] = await loop.run_in_executor(self._waiting, self._call, verb, limited)
            over = all(rollout.state.is_over for rollout in rollouts)
            if over or left_s <= _SLICE_S or await request.is_disconnected():
                return verb.write_result(rollouts)


def _read(verb: Verb, sent: bytes | Mapping[str, str]) -> dict[str, Any]:
    try:
        return verb.read_arguments(sent)
    except AglError as error:
        raise ApiError(ERRORS[INVALID][0], INVALID, str(error)) from error


def _refusal(error: StoreError) -> ApiError:
    """The nearest of ERRORS; what none of them names is a store that may do better the next time."""
    for code, (status, kind) in ERRORS.items():
        if kind is not StoreError and isinstance(error, kind):
            return ApiError(status, code, str(error))
    logger.error("a verb was refused, to be repeated: %s", error)
    return ApiError(ERRORS[UNAVAILABLE][0], UNAVAILABLE, str(error))


def _refuse(refusal: ApiError) -> Response:
    answer = refusal.response()
    if refusal.code == UNAVAILABLE:
        answer.headers["retry-after"] = str(_RETRY_AFTER_S)
    return answer


async def _show_document(_: Request) -> JSONResponse:
    return JSONResponse(document())
