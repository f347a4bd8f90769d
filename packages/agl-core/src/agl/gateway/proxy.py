"""The gateway's app: the APIs of models in front of the engines, with and without a rollout in the URL."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

import aiohttp
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from agl import semconv
from agl.config import GatewayConfig
from agl.errors import AglError
from agl.gateway.call import Call
from agl.gateway.continuation import Continuations
from agl.gateway.control import Control
from agl.gateway.dialect import DIALECTS, Dialect
from agl.gateway.dispatch import Dispatch, Trip
from agl.gateway.engine import Engine
from agl.gateway.exchange import Exchange
from agl.gateway.gate import Gate
from agl.gateway.health import Health, list_models
from agl.gateway.identity import Caller, Callers
from agl.gateway.recorder import Recorder
from agl.gateway.request import Seeds, changes, prepare
from agl.gateway.routing import Routes
from agl.gateway.upstream_response import forwarded
from agl.server.api_error import ApiError, unknown_route
from agl.server.auth import project_of
from agl.server.body import read_body
from agl.store import Store
from agl.tokens.capture import Json

_KEEPALIVE_S: Final = 4
"""Shorter than engines keep idle connections (uvicorn: 5 s), so that no request meets a connection being closed."""
_PREFIXES: Final = ("/v1", "/rollout/{rollout_id}/attempt/{attempt_id}/v1")


class Gateway:
    """Proxy to the engines that `config` lists; with none, calls are refused.

    `overrides` maps a mode (`train`, `eval`, `prod`) to request fields that are forced on its calls. Raises ConfigError
    where an engine's key is not in the environment.
    """

    def __init__(
        self, store: Store, config: GatewayConfig, *, overrides: Mapping[str, Mapping[str, Any]] | None = None
    ) -> None:
        self._store = store
        self._config = config
        self._overrides = overrides or {}
        self._seeds = Seeds()
        self._callers = Callers(store)
        self._continuations = Continuations(config)
        self.routes = Routes([Engine(engine) for engine in config.engines], config.models)
        self.gate = Gate()
        self.dispatch = Dispatch(self.routes, self.gate, config)

    def app(self, more_routes: Sequence[BaseRoute] = ()) -> Starlette:
        """The ASGI app, with `more_routes` beside its own."""
        routes: list[BaseRoute] = [
            Route(prefix + path, _CallEndpoint(self, dialect), methods=["POST"])
            for prefix in _PREFIXES
            for path, dialect in DIALECTS.items()
        ]
        routes += [Route(f"{prefix}/models", self._models) for prefix in _PREFIXES]
        routes += [Route(f"{prefix}/embeddings", self._embeddings, methods=["POST"]) for prefix in _PREFIXES]
        return Starlette(
            routes=[*routes, *Control(self.gate, self.routes).routes(), *more_routes],
            lifespan=self._lifespan,
            exception_handlers={HTTPException: unknown_route, AglError: _refuse},
        )

    async def engine_states(self) -> list[Json]:
        """For each engine its URL, whether it lists its models within two seconds, and how many calls are there."""
        return await self._health.states()

    async def read_body(self, request: Request) -> bytes:
        """Raises ApiError for a body over the limit, ClientDisconnect for one that does not come."""
        limit = self._config.max_body_bytes

        def check_size(size: int) -> None:
            if size > limit:
                raise ApiError(413, "too_large", f"the request is over {limit} bytes (gateway.max_body_bytes)")

        return await read_body(request.receive, check_size)

    async def exchange(self, request: Request, data: bytes, kind: type[Dialect], send: Send) -> None:
        """Answer one call. Raises ApiError for a request that cannot be sent on."""
        text, body = _read_json(data)
        asked = body["model"] if isinstance(body.get("model"), str) else None
        model = asked and self.routes.resolve(asked)
        dialect = kind(body, model)
        caller = await self._callers.identify(request)
        sent = self._prepare(dialect, caller, model or "")
        trip = Trip(model or "", kind.path, json.dumps(sent).encode(), forwarded(request.headers), caller.rollout_id)
        is_chat = kind.operation == semconv.OPERATION_CHAT
        call = Call(
            caller,
            kind.operation,
            client_body=text,
            sent=sent,
            changed=changes(body, sent) if kind.is_native else changes({}, sent),
            project=project_of(request.scope),
            trip=trip,
            model=asked,
        )
        exchange = Exchange(
            call,
            dialect,
            place=self._continuations.place(caller, model, sent) if is_chat else None,
            continuations=self._continuations,
            dispatch=self.dispatch,
            recorder=self._recorder,
            mode=self._config.record,
            send=send,
        )
        await exchange.run(self._session, request.scope, request.receive)

    def _prepare(self, dialect: Dialect, caller: Caller, model: str) -> Json:
        return prepare(
            dialect.request,
            dialect.operation,
            ids=self.routes.shape(model).ids(dialect.operation),
            extra_body=self._config.extra_body,
            forced=self._overrides.get(caller.mode or "prod", {}),
            seed=self._seeds.next(*caller.seed_key) if caller.seed_key else None,
        )

    async def _models(self, request: Request) -> Response:
        return await list_models(self._session, self.routes, forwarded(request.headers))

    async def _embeddings(self, request: Request) -> Response:
        """Passed on and not recorded: nothing is sampled."""
        _, body = _read_json(await self.read_body(request))
        model = self.routes.resolve(str(body.get("model", "")))
        sent = json.dumps(body | {"model": model} if model else body).encode()
        rollout = request.path_params.get("rollout_id")
        trip = Trip(model, "/embeddings", sent, forwarded(request.headers), rollout)
        async with self.dispatch.answer(self._session, trip) as answer:
            return Response(answer.body, answer.status, forwarded(answer.headers))

    @asynccontextmanager
    async def _lifespan(self, _app: Starlette) -> AsyncIterator[None]:
        # Answers have deadlines of their own; how many connections there are `max_concurrent` says.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=self._config.timeouts.connect_s)
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S)
        self._recorder = Recorder(self._store)
        async with aiohttp.ClientSession(
            connector=connector,
            timeout=timeout,
            headers={"accept-encoding": "identity"},
            cookie_jar=aiohttp.DummyCookieJar(),
        ) as self._session:
            self._health = Health(self._session, self.routes, self._config.health_s)
            async with self._health.watching():
                yield
        await self._recorder.close()


class _CallEndpoint:
    """ASGI endpoint of one dialect. The call is cancelled when its client goes away, streaming or not."""

    def __init__(self, gateway: Gateway, dialect: type[Dialect]) -> None:
        self._gateway = gateway
        self._dialect = dialect

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            body = await self._gateway.read_body(request)
            await self._exchange(request, body, receive, send)
        except ClientDisconnect:
            return
        except AglError as error:
            refusal = error if isinstance(error, ApiError) else ApiError(500, "gateway_error", str(error))
            await self._dialect.refusal(refusal)(scope, receive, send)

    async def _exchange(self, request: Request, body: bytes, receive: Receive, send: Send) -> None:
        call, left = asyncio.current_task(), False
        assert call is not None

        def leave(_: object) -> None:
            nonlocal left
            left = True
            call.cancel()

        gone = asyncio.create_task(_disconnect(receive))
        gone.add_done_callback(leave)
        try:
            await self._gateway.exchange(request, body, self._dialect, send)
        except asyncio.CancelledError:
            if not left:
                raise
            call.uncancel()
        finally:
            gone.remove_done_callback(leave)
            gone.cancel()


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _refuse(_request: Request, error: Exception) -> Response:
    refusal = error if isinstance(error, ApiError) else ApiError(500, "gateway_error", str(error))
    return refusal.response()


def _read_json(body: bytes) -> tuple[str, Json]:
    """The body as text and as JSON object."""
    try:
        text = body.decode()
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "invalid_json", f"the request body is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise ApiError(400, "invalid_json", f"the request body is {type(data).__name__}, expected a JSON object")
    return text, data
