"""The gateway's ASGI app: the model APIs in front of the engines, with and without a rollout in the URL."""

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

import aiohttp
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from agl.config import GatewayConfig, UpstreamConfig
from agl.config.section import DEFAULT_PROJECT
from agl.errors import AglError
from agl.gateway.arms import Arms
from agl.gateway.control import Control
from agl.gateway.dialect.dialect import ChatCompletion, Dialect, TextCompletion
from agl.gateway.dialect.messages import Messages
from agl.gateway.dialect.responses import Responses
from agl.gateway.dispatch import Dispatch, PauseGate, Routes
from agl.gateway.engine import Engine, forwarded
from agl.gateway.exchange import CallEndpoint, GatewayParts
from agl.gateway.health import Health, find_model, list_models
from agl.gateway.record import CallRecord, Recorder
from agl.gateway.request import Caller, CallerLookup, RolloutUrls, read_json, url_ids
from agl.gateway.token_count import MessagesCount, ResponsesCount, TokenCount
from agl.server.api_error import ApiError, unknown_route
from agl.server.auth import project_of
from agl.server.receiving import MemoryBudget, Reservation, long_work, peer_of
from agl.store import Store
from agl.store.traffic import Intake
from agl.tokens.capture import Json

_KEEPALIVE_S: Final = 4
"""Shorter than engines keep idle connections (uvicorn: 5 s), so that no request meets a connection being closed."""
_PREFIX: Final = "/v1"
_DIALECTS: Final[Mapping[str, type[Dialect]]] = {
    "/chat/completions": ChatCompletion,
    "/completions": TextCompletion,
    "/responses": Responses,
    "/messages": Messages,
}
"""By path below _PREFIX."""
_COUNTS: Final[Mapping[str, type[TokenCount]]] = {
    "/messages/count_tokens": MessagesCount,
    "/responses/input_tokens": ResponsesCount,
}


class Gateway:
    """Proxy to the engines that `config` lists; with none, every call fails with an error.

    `overrides` maps a mode (`train`, `eval`, `prod`) to request fields that are forced on its calls. Raises ConfigError
    if the environment has no value for an engine's key.
    """

    def __init__(
        self,
        stores: Mapping[str, Store],
        config: GatewayConfig,
        *,
        overrides: Mapping[str, Mapping[str, Any]] | None = None,
        intakes: Mapping[str, Store | Intake] | None = None,
    ) -> None:
        self._intakes = intakes or stores
        self._config = config
        self._routes = Routes([Engine(engine) for engine in config.engines], config.models)
        self._gate = PauseGate()
        dispatch = Dispatch(self._routes, self._gate, config)
        budget = MemoryBudget(config.max_pending_bytes, config.max_body_bytes, "gateway")
        arms, callers = Arms(stores[DEFAULT_PROJECT]), CallerLookup(stores)
        self._parts = GatewayParts(config, overrides or {}, callers, self._routes, dispatch, arms, budget)

    def app(self, more_routes: Sequence[BaseRoute] = ()) -> Starlette:
        """The ASGI app, with `more_routes` after its own."""
        routes: list[BaseRoute] = [
            Route(_PREFIX + path, CallEndpoint(self._parts, dialect), methods=["POST"])
            for path, dialect in _DIALECTS.items()
        ]
        for path, count in _COUNTS.items():
            routes.append(Route(_PREFIX + path, count(self._parts), methods=["POST"]))
        routes.append(Route(f"{_PREFIX}/models", self._models))
        routes.append(Route(_PREFIX + "/models/{model:path}", self._model))
        routes.append(Route(f"{_PREFIX}/embeddings", self._embeddings, methods=["POST"]))
        app = Starlette(
            middleware=[Middleware(RolloutUrls)],
            routes=[
                *routes,
                *Control(self._gate, self._routes, self._parts.arms, self._parts.budget).routes(),
                *more_routes,
            ],
            lifespan=self._lifespan,
            exception_handlers={HTTPException: unknown_route, AglError: _error_response},
        )
        app.router.redirect_slashes = False  # A redirect would lead to the path without the rollout.
        return app

    @property
    def metrics(self) -> CollectorRegistry:
        """Counts of the calls, for Prometheus."""
        return self._parts.metrics.registry

    @property
    def live_versions(self) -> Mapping[str, str]:
        """By role the policy version to which its calls go, where the API or a promotion has set one."""
        return {**self._routes.versions, **self._parts.arms.versions}

    def add_engine(self, config: UpstreamConfig) -> None:
        """Send calls to this engine too. Thread-safe."""
        self._routes.add_engine(config)

    def remove_engine(self, url: str) -> None:
        """Send no more calls to the engine at `url`; those that run go on. Thread-safe."""
        self._routes.remove_engine(url)

    async def engine_states(self) -> list[Json]:
        """For each engine its URL, whether it lists its models within 1.5 s, and its active and waiting calls."""
        return await self._health.states()

    async def _models(self, request: Request) -> Response:
        return await list_models(self._parts.session, self._routes, forwarded(request.headers))

    async def _model(self, request: Request) -> Response:
        name = request.path_params["model"]
        return await find_model(self._parts.session, self._routes, forwarded(request.headers), name)

    async def _embeddings(self, request: Request) -> Response:
        """Passed on and not recorded: nothing is sampled."""
        with Reservation(self._parts.budget, peer_of(request.scope)) as reservation:
            data = await self._parts.read_body(request.scope, request.receive, reservation)
            _, body = await long_work(len(data), read_json, data)
            return await self._embed(request, body)

    async def _embed(self, request: Request, body: Json) -> Response:
        model = self._routes.resolve(str(body.get("model", "")), self._parts.arms.versions)
        sent = body | {"model": model} if model else body
        caller = Caller(rollout_id=url_ids(request.scope).get("rollout_id"), project=project_of(request.scope))
        headers = forwarded(request.headers)
        record = CallRecord(caller, "embeddings", "/embeddings", headers, model, sent, body=json.dumps(sent).encode())
        async with self._parts.dispatch.response(self._parts.session, record) as response:
            return Response(response.body, response.status, forwarded(response.headers))

    @asynccontextmanager
    async def _lifespan(self, _app: Starlette) -> AsyncIterator[None]:
        # No total timeout and no connection limit: `gateway.timeouts` and `max_concurrent` set these for each call.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=self._config.timeouts.connect_s)
        self._parts.recorder = Recorder(self._intakes)
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S),
            timeout=timeout,
            headers={"accept-encoding": "identity"},
            cookie_jar=aiohttp.DummyCookieJar(),
        ) as self._parts.session:
            self._health = Health(self._parts.session, self._routes, self._config.health_s)
            async with self._health.watching(), self._parts.arms.following():
                yield
        await self._parts.recorder.close()


async def _error_response(_request: Request, error: Exception) -> Response:
    assert isinstance(error, AglError)
    return ApiError.of(error).response()
