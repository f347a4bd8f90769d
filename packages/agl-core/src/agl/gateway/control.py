"""Verbs of the gateway itself: pause and resume it, and say by which version a name is answered."""

from typing import Final, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import BaseRoute, Route

from agl.gateway.gate import Gate
from agl.gateway.routing import Routes
from agl.server.api_error import ApiError

PREFIX: Final = "/api/gateway"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Pause(_Strict):
    """How long to wait for the calls that are with an engine."""

    drain_s: float = Field(default=60.0, ge=0, le=3600)


class Name(_Strict):
    """What a name stands for, e.g. `planner@12`; None: for itself."""

    model: str | None = Field(min_length=1)


Body = TypeVar("Body", Pause, Name)


class Control:
    """`GET /api/gateway`, `POST /api/gateway/pause`, `POST .../resume`, `PUT .../models/{name}`."""

    def __init__(self, gate: Gate, routes: Routes) -> None:
        self._gate = gate
        self._routes = routes

    def routes(self) -> list[BaseRoute]:
        return [
            Route(PREFIX, self._show, methods=["GET"]),
            Route(f"{PREFIX}/pause", self._pause, methods=["POST"]),
            Route(f"{PREFIX}/resume", self._resume, methods=["POST"]),
            Route(f"{PREFIX}/models/{{name}}", self._name, methods=["PUT"]),
        ]

    async def _show(self, _: Request) -> JSONResponse:
        return self._state()

    async def _pause(self, request: Request) -> JSONResponse:
        """Answers when the calls under way have ended, or `drain_s` is over: then `calls` says how many have not."""
        await self._gate.close((await _read(request, Pause)).drain_s)
        return self._state()

    async def _resume(self, _: Request) -> JSONResponse:
        self._gate.open()
        return self._state()

    async def _name(self, request: Request) -> JSONResponse:
        name, model = request.path_params["name"], (await _read(request, Name)).model
        if model is None:
            self._routes.names.pop(name, None)
        else:
            self._routes.names[name] = model
        return self._state()

    def _state(self) -> JSONResponse:
        return JSONResponse({"paused": self._gate.is_closed, "calls": self._gate.inside, "models": self._routes.names})


async def _read(request: Request, kind: type[Body]) -> Body:
    try:
        return kind.model_validate_json(await request.body() or b"{}")
    except ValidationError as error:
        said = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise ApiError(422, "invalid", f"{request.url.path}: {said}") from error
