"""Whether the engines answer: asked regularly where there are several, and whenever somebody wants to know."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any, Final

import aiohttp
from starlette.responses import JSONResponse, Response

from agl.gateway.engine import Engine
from agl.gateway.routing import Routes
from agl.gateway.upstream_response import engine_failure, forwarded
from agl.server.api_error import ApiError
from agl.tokens.capture import Json

_TIMEOUT_S: Final = 2
_MODELS_TIMEOUT_S: Final = 30


class Health:
    """Looks at the engines of `routes` every `every_s` seconds, where there is a choice between them."""

    def __init__(self, session: aiohttp.ClientSession, routes: Routes, every_s: float) -> None:
        self._session = session
        self._routes = routes
        self._every_s = every_s

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        watch = asyncio.create_task(self._watch()) if len(self._routes.engines) > 1 else None
        try:
            yield
        finally:
            if watch is not None:
                watch.cancel()
                with suppress(asyncio.CancelledError):
                    await watch

    async def states(self) -> list[Json]:
        """Of each engine, asked now: its URL, whether it answers, and how many calls are there and wait."""
        await self._look()
        return [
            {
                "url": engine.url,
                "answers": engine.answers,
                "calls": engine.slots.in_use,
                "waiting": engine.slots.waiting,
            }
            for engine in self._routes.engines
        ]

    async def _watch(self) -> None:
        while True:
            await self._look()
            await asyncio.sleep(self._every_s)

    async def _look(self) -> None:
        await asyncio.gather(*map(self._ask, self._routes.engines))

    async def _ask(self, engine: Engine) -> None:
        try:
            answer = await _get_models(self._session, engine, {}, _TIMEOUT_S)
            engine.answers = answer.status_code == 200
        except ApiError:
            engine.answers = False


async def list_models(session: aiohttp.ClientSession, routes: Routes, headers: Mapping[str, str]) -> Response:
    """What `/v1/models` answers: the engine's own list, or one of all engines and of the names that stand for others.

    Engines that fail are left out as long as one does not. Raises ApiError where there is none, or all fail.
    """
    if len(routes.engines) == 1 and not routes.names:
        return await _get_models(session, routes.engines[0], headers, _MODELS_TIMEOUT_S)
    if not routes.engines:
        routes.choose("", None)
    answers = await asyncio.gather(
        *(_get_models(session, engine, headers, _MODELS_TIMEOUT_S) for engine in routes.engines),
        return_exceptions=True,
    )
    listed = [_models(answer) for answer in answers if isinstance(answer, Response) and answer.status_code == 200]
    if not listed:
        first = answers[0]
        if isinstance(first, BaseException):
            raise first
        return first
    known = {str(model.get("id")): model for models in listed for model in models}
    names = {name: {"id": name, "object": "model", "owned_by": "agl"} for name in routes.names}
    return JSONResponse({"object": "list", "data": [*(known | names).values()]})


async def _get_models(
    session: aiohttp.ClientSession, engine: Engine, headers: Mapping[str, str], timeout_s: float
) -> Response:
    try:
        async with asyncio.timeout(timeout_s):
            async with session.get(
                f"{engine.url}/models", headers=engine.headers(headers), allow_redirects=False
            ) as answer:
                return Response(await answer.read(), answer.status, forwarded(answer.headers))
    except (aiohttp.ClientError, TimeoutError) as error:
        raise engine_failure(error, engine.url, f"{timeout_s:g} s") from error


def _models(answer: Response) -> list[dict[str, Any]]:
    try:
        return [model for model in json.loads(bytes(answer.body))["data"] if isinstance(model, dict)]
    except (ValueError, TypeError, KeyError):
        return []
