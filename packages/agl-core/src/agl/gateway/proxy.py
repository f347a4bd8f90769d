"""The gateway's app: OpenAI routes in front of one engine, with and without a rollout in the URL."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from agl import semconv
from agl.capture import Asked, Json
from agl.config import GatewayConfig
from agl.errors import AglError
from agl.gateway.exchange import Exchange, engine_failure, forwarded
from agl.gateway.identity import Caller
from agl.gateway.record import Call
from agl.gateway.refusal import Refusal, refuse_route
from agl.gateway.request import Seeds, prepare
from agl.store import Store

_CONNECT_TIMEOUT_S = 10
_HEALTH_TIMEOUT_S = 2
_KEEPALIVE_S = 4
"""Shorter than engines keep idle connections (uvicorn: 5 s), so that no request meets a connection being closed."""
_PREFIXES = ("/v1", "/rollout/{rollout_id}/attempt/{attempt_id}/v1")
_CALL_PATHS = {
    "/chat/completions": semconv.OPERATION_CHAT,
    "/completions": semconv.OPERATION_TEXT_COMPLETION,
}


class Gateway:
    """Proxy to the engine at `upstream` (a base URL ending in `/v1`; None: there is none yet, calls get 503).

    `overrides` maps a mode (`train`, `eval`, `prod`) to request fields that are forced on its calls.
    """

    def __init__(
        self,
        store: Store,
        *,
        upstream: str | None,
        config: GatewayConfig | None = None,
        overrides: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self.upstream = upstream.rstrip("/") if upstream else None
        self._store = store
        self._config = config or GatewayConfig()
        self._overrides = overrides or {}
        self._seeds = Seeds()

    def app(self, more_routes: Sequence[BaseRoute] = ()) -> Starlette:
        """The ASGI app, with `more_routes` beside the OpenAI ones."""
        routes: list[BaseRoute] = [
            Route(prefix + path, _CallEndpoint(self, path, operation), methods=["POST"])
            for prefix in _PREFIXES
            for path, operation in _CALL_PATHS.items()
        ]
        routes += [Route(f"{prefix}/models", self._models) for prefix in _PREFIXES]
        return Starlette(
            routes=[*routes, *more_routes],
            lifespan=self._lifespan,
            exception_handlers={HTTPException: refuse_route, AglError: _refuse},
        )

    async def engine_answers(self) -> bool:
        """Whether the engine lists its models within two seconds."""
        try:
            return (await self._get_models({}, _HEALTH_TIMEOUT_S)).status_code == 200
        except Refusal:
            return False

    async def exchange(self, request: Request, path: str, operation: str, send: Send) -> None:
        """Answer one call. Raises Refusal for a request that cannot be forwarded."""
        client_body, body = _read_json(await request.body())
        caller = await self._identify(request)
        call = Call(
            caller,
            operation,
            client_body=client_body,
            sent=self._prepare(body, operation, caller),
            upstream=self._engine(),
        )
        exchange = Exchange(
            call,
            Asked.read(body, operation),
            session=self._session,
            store=self._store,
            url=self._engine() + path,
            send=send,
        )
        await exchange.run(request.headers, request.scope, request.receive)

    async def _identify(self, request: Request) -> Caller:
        caller = Caller.read(request.headers, request.path_params)
        if caller.rollout_id is None or caller.mode is not None:
            return caller.completed_by(None)
        return caller.completed_by(await asyncio.to_thread(self._store.get_rollout, caller.rollout_id))

    def _prepare(self, body: Json, operation: str, caller: Caller) -> Json:
        trains = caller.mode == "train" and caller.rollout_id is not None
        return prepare(
            body,
            operation,
            extra_body=self._config.extra_body,
            forced=self._overrides.get(caller.mode or "prod", {}),
            seed=self._seeds.next(caller.rollout_id or "", caller.attempt_id or "") if trains else None,
        )

    async def _models(self, request: Request) -> Response:
        return await self._get_models(request.headers, self._config.timeout_s)

    async def _get_models(self, headers: Mapping[str, str], timeout_s: float) -> Response:
        upstream, timeout = self._engine(), aiohttp.ClientTimeout(total=timeout_s)
        try:
            async with self._session.get(
                f"{upstream}/models", headers=forwarded(headers), timeout=timeout, allow_redirects=False
            ) as answer:
                return Response(await answer.read(), answer.status, forwarded(answer.headers))
        except (aiohttp.ClientError, TimeoutError) as error:
            raise engine_failure(error, upstream) from error

    def _engine(self) -> str:
        if self.upstream is None:
            raise Refusal(503, "no_engine", "the gateway has no engine; start it with --upstream URL or train with it")
        return self.upstream

    @asynccontextmanager
    async def _lifespan(self, _app: Starlette) -> AsyncIterator[None]:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT_S, sock_read=self._config.timeout_s)
        # Every rollout may hold a stream open: the number of connections is the clients' to bound.
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S)
        async with aiohttp.ClientSession(
            connector=connector, timeout=timeout, headers={"accept-encoding": "identity"}
        ) as self._session:
            yield


class _CallEndpoint:
    """ASGI endpoint of one call path. The call is cancelled when its client goes away, streaming or not."""

    def __init__(self, gateway: Gateway, path: str, operation: str) -> None:
        self._gateway = gateway
        self._path = path
        self._operation = operation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            await request.body()
        except ClientDisconnect:
            return
        exchange = asyncio.create_task(self._gateway.exchange(request, self._path, self._operation, send))
        gone = asyncio.create_task(_disconnect(receive))
        try:
            await asyncio.wait({exchange, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            unfinished = not exchange.done()
            exchange.cancel()
            gone.cancel()
            await asyncio.gather(exchange, gone, return_exceptions=True)
        if not unfinished:
            exchange.result()


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _refuse(_request: Request, error: Exception) -> Response:
    refusal = error if isinstance(error, Refusal) else Refusal(500, "gateway_error", str(error))
    return refusal.response()


def _read_json(body: bytes) -> tuple[str, Json]:
    """The body as text and as JSON object."""
    try:
        text = body.decode()
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, "invalid_json", f"the request body is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise Refusal(400, "invalid_json", f"the request body is {type(data).__name__}, expected a JSON object")
    return text, data
