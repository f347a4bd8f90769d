"""The server: a route for each verb, and one for the OpenAPI document."""

import asyncio
import logging
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from agl.config.collector import CollectorConfig
from agl.errors import AglError, StoreError
from agl.server.api_error import ApiError
from agl.server.auth import project_of
from agl.server.receiving import MemoryBudget, Reservation, check_json, long_work, peer_of, read_body
from agl.store.http.openapi import document
from agl.store.http.verb import ERRORS, INVALID, JSON, MAX_WAIT_S, PREFIX, PROTOBUF, UNAVAILABLE, VERBS, Verb
from agl.store.protocol import Store
from agl.store.rollout import Rollout

logger = logging.getLogger(__name__)

_VERB_THREADS: Final = 16
"""Threads that call the store, which commits concurrent changes together."""
_WAIT_THREADS: Final = 64
_SLICE_S: Final = 1.0
"""A wait takes a thread for one slice at a time: others get their turn, and a disconnect is noticed in between."""
_RETRY_AFTER_S: Final = 1


class StoreApi:
    """Routes of the verbs, on the one of `stores` that is of the project of the request's token.

    `config` has the limits for request bodies.
    """

    def __init__(self, stores: Mapping[str, Store], config: CollectorConfig | None = None) -> None:
        self._stores = stores
        config = config or CollectorConfig()
        self._budget = MemoryBudget(config.max_pending_bytes, config.max_body_bytes, "collector")
        self._pool = ThreadPoolExecutor(_VERB_THREADS, "agl-api")
        self._wait_pool = ThreadPoolExecutor(_WAIT_THREADS, "agl-api-wait")

    def routes(self) -> list[BaseRoute]:
        verbs = [Route(verb.path, self._endpoint(verb), methods=[verb.method]) for verb in VERBS.values()]
        return [Route(f"{PREFIX}/openapi.json", _show_document), *verbs]

    def close(self) -> None:
        """Finish the current requests and end the threads. May be called twice."""
        self._pool.shutdown()
        self._wait_pool.shutdown()

    def _endpoint(self, verb: Verb) -> Any:
        async def respond(request: Request) -> Response:
            try:
                with Reservation(self._budget, peer_of(request.scope)) as reservation:
                    return await self._respond(verb, request, reservation)
            except ClientDisconnect:
                return Response(status_code=400)  # Nobody reads it.
            except ApiError as error:
                return error.response()

        return respond

    async def _respond(self, verb: Verb, request: Request, reservation: Reservation) -> Response:
        sent = dict(request.query_params) if verb.method == "GET" else await self._read_body(verb, request, reservation)
        project = project_of(request.scope)
        if verb.waits:
            body = await self._wait(project, verb, await long_work(len(sent), _read_arguments, verb, sent), request)
        else:
            body = await asyncio.get_running_loop().run_in_executor(self._pool, self._perform, project, verb, sent)
        return Response(body, media_type=PROTOBUF if verb.returns_spans else JSON)

    async def _read_body(self, verb: Verb, request: Request, reservation: Reservation) -> bytes:
        content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        # Also protects against web pages: a browser sends these types to another origin only after a preflight request.
        if content_type != verb.content_type:
            raise ApiError(415, "unknown_content_type", f"{verb.path} takes {verb.content_type}, got {content_type!r}")
        body = await read_body(request.scope, request.receive, reservation)
        if not verb.takes_spans:
            await long_work(len(body), check_json, body, reservation)
        return body

    def _perform(self, project: str, verb: Verb, sent: bytes | Mapping[str, str]) -> bytes:
        return verb.write_result(self._call(project, verb, _read_arguments(verb, sent)))

    def _call(self, project: str, verb: Verb, arguments: Mapping[str, Any]) -> Any:
        try:
            return getattr(self._stores[project], verb.name)(**arguments)
        except StoreError as error:
            raise _api_error(error) from error

    async def _wait(self, project: str, verb: Verb, arguments: dict[str, Any], request: Request) -> bytes:
        timeout_s = arguments.pop("timeout_s")
        deadline = time.monotonic() + (MAX_WAIT_S if timeout_s is None else min(timeout_s, MAX_WAIT_S))
        loop = asyncio.get_running_loop()
        while True:
            left_s = deadline - time.monotonic()
            slice_arguments = {**arguments, "timeout_s": min(left_s, _SLICE_S)}
            waiting = loop.run_in_executor(self._wait_pool, self._call, project, verb, slice_arguments)
            rollouts: list[Rollout] = await waiting
            over = all(rollout.state.is_over for rollout in rollouts)
            if over or left_s <= _SLICE_S or await request.is_disconnected():
                return verb.write_result(rollouts)


def _read_arguments(verb: Verb, sent: bytes | Mapping[str, str]) -> dict[str, Any]:
    try:
        return verb.read_arguments(sent)
    except AglError as error:
        raise ApiError(ERRORS[INVALID][0], INVALID, str(error)) from error


def _api_error(error: StoreError) -> ApiError:
    """The error of ERRORS for `error`; unavailable for all other errors, after which a retry may succeed."""
    for code, (status, kind) in ERRORS.items():
        if kind is not StoreError and isinstance(error, kind):
            return ApiError(status, code, str(error))
    logger.error("a verb failed, and its client was asked to retry: %s", error)
    return _unavailable(str(error))


def _unavailable(message: str) -> ApiError:
    return ApiError(ERRORS[UNAVAILABLE][0], UNAVAILABLE, message, retry_after_s=_RETRY_AFTER_S)


async def _show_document(_: Request) -> JSONResponse:
    return JSONResponse(document())
