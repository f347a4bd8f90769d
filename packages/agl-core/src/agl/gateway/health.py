"""Which engines are reachable: checked at intervals if there are several, and on request."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any, Final

import aiohttp
from starlette.responses import JSONResponse, Response

from agl.gateway.dispatch import Routes
from agl.gateway.engine import Engine, engine_failure, forwarded
from agl.server.api_error import ApiError
from agl.tokens.capture import Json

_TIMEOUT_S: Final = 1.5
_MODELS_TIMEOUT_S: Final = 30


class Health:
    """Checks the engines of `routes` every `every_s` seconds, while there is more than one."""

    def __init__(self, session: aiohttp.ClientSession, routes: Routes, every_s: float) -> None:
        self._session = session
        self._routes = routes
        self._every_s = every_s

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        watch = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            watch.cancel()
            with suppress(asyncio.CancelledError):
                await watch

    async def states(self) -> list[Json]:
        """For each engine, checked now: its URL, whether it responds, and how many calls are active and waiting."""
        await self._check_all()
        return [
            {
                "url": engine.url,
                "answers": engine.is_reachable,
                "calls": engine.queue.in_use,
                "waiting": engine.queue.waiting,
            }
            for engine in self._routes.engines
        ]

    async def _watch(self) -> None:
        while True:
            if len(self._routes.engines) > 1:
                await self._check_all()
            await asyncio.sleep(self._every_s)

    async def _check_all(self) -> None:
        await asyncio.gather(*map(self._check, self._routes.engines))

    async def _check(self, engine: Engine) -> None:
        try:
            engine.is_reachable = (await _get_models(self._session, engine, {}, _TIMEOUT_S)).status_code == 200
        except ApiError:
            engine.is_reachable = False


async def list_models(session: aiohttp.ClientSession, routes: Routes, headers: Mapping[str, str]) -> Response:
    """Response to `/v1/models`: the engine's own list, or the models of all engines with the mapped names.

    Engines that fail are left out as long as one responds. Raises ApiError if there is no engine, or all fail.
    """
    if len(routes.engines) == 1 and not routes.names and not routes.versions:
        return await _get_models(session, routes.engines[0], headers, _MODELS_TIMEOUT_S)
    if not routes.engines:
        routes.choose("", None)
    requests = [_get_models(session, engine, headers, _MODELS_TIMEOUT_S) for engine in routes.engines]
    responses = await asyncio.gather(*requests, return_exceptions=True)
    listed = [_models(one) for one in responses if isinstance(one, Response) and one.status_code == 200]
    if not listed:
        first = responses[0]
        if isinstance(first, BaseException):
            raise first
        return first
    known = {str(model.get("id")): model for models in listed for model in models}
    names = {name: {"id": name, "object": "model", "owned_by": "agl"} for name in {**routes.names, **routes.versions}}
    return JSONResponse({"object": "list", "data": [*(known | names).values()]})


async def find_model(session: aiohttp.ClientSession, routes: Routes, headers: Mapping[str, str], name: str) -> Response:
    """Response to `/v1/models/{name}`: its entry in the list. Raises ApiError as `list_models` does."""
    listed = await list_models(session, routes, headers)
    if listed.status_code != 200:
        return listed
    found = next((model for model in _models(listed) if model.get("id") == name), None)
    if found is None:
        raise ApiError(404, "model_not_found", f"no engine lists the model {name!r}")
    return JSONResponse(found)


async def _get_models(
    session: aiohttp.ClientSession, engine: Engine, headers: Mapping[str, str], timeout_s: float
) -> Response:
    url, sent = f"{engine.url}/models", engine.headers(headers)
    try:
        async with asyncio.timeout(timeout_s), session.get(url, headers=sent, allow_redirects=False) as response:
            return Response(await response.read(), response.status, forwarded(response.headers))
    except (aiohttp.ClientError, TimeoutError) as error:
        raise engine_failure(error, engine.url, f"{timeout_s:g} s") from error


def _models(response: Response) -> list[dict[str, Any]]:
    try:
        return [model for model in json.loads(bytes(response.body))["data"] if isinstance(model, dict)]
    except (ValueError, TypeError, KeyError, RecursionError):
        return []
