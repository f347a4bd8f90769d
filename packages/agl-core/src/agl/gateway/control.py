"""The gateway's own HTTP API: pause, resume, and the model names of the engines."""

from typing import Annotated, Final, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import BaseRoute, Route

from agl.gateway.arms import Arms
from agl.gateway.dispatch import PauseGate, Routes
from agl.server.api_error import ApiError
from agl.server.receiving import MemoryBudget, Reservation, peer_of, read_body

PREFIX: Final = "/api/gateway"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class PauseBody(_Strict):
    drain_s: float = Field(default=60.0, ge=0, le=3600)
    """Seconds to wait for active calls."""


class ModelBody(_Strict):
    model: str | None = Field(min_length=1)
    """Model name for the engines, e.g. `planner@12`; None removes the mapping."""


class VersionsBody(_Strict):
    versions: dict[str, Annotated[str, Field(min_length=1)] | None]
    """The pinned version that answers for each role, e.g. `planner@12`; None removes a role. Other roles stay."""


Body = TypeVar("Body", PauseBody, ModelBody, VersionsBody)


class Control:
    """`GET /api/gateway`, `POST /api/gateway/pause`, `POST .../resume`, `PUT .../models/{name}`,
    `PATCH .../versions`."""

    def __init__(self, gate: PauseGate, routes: Routes, arms: Arms, budget: MemoryBudget) -> None:
        self._arms = arms
        self._budget = budget
        self._gate = gate
        self._routes = routes

    def routes(self) -> list[BaseRoute]:
        return [
            Route(PREFIX, self._show, methods=["GET"]),
            Route(f"{PREFIX}/pause", self._pause, methods=["POST"]),
            Route(f"{PREFIX}/resume", self._resume, methods=["POST"]),
            Route(f"{PREFIX}/models/{{name}}", self._set_model, methods=["PUT"]),
            Route(f"{PREFIX}/versions", self._set_versions, methods=["PATCH"]),
        ]

    async def _show(self, _: Request) -> JSONResponse:
        return self._state()

    async def _pause(self, request: Request) -> JSONResponse:
        """Responds when no call is active, or after `drain_s`; then `calls` is the number that is still active."""
        await self._gate.pause((await self._read(request, PauseBody)).drain_s)
        return self._state()

    async def _resume(self, _: Request) -> JSONResponse:
        self._gate.resume()
        return self._state()

    async def _set_model(self, request: Request) -> JSONResponse:
        name, model = request.path_params["name"], (await self._read(request, ModelBody)).model
        if model is None:
            self._routes.names.pop(name, None)
        else:
            self._routes.names[name] = model
        return self._state()

    async def _set_versions(self, request: Request) -> JSONResponse:
        self._routes.switch((await self._read(request, VersionsBody)).versions)
        return self._state()

    def _state(self) -> JSONResponse:
        gate, routes = self._gate, self._routes
        production = dict(self._arms.versions)
        tables = {"models": routes.names, "versions": dict(routes.versions), "production": production}
        return JSONResponse({"paused": gate.is_paused, "calls": gate.active_calls, **tables})

    async def _read(self, request: Request, kind: type[Body]) -> Body:
        try:
            with Reservation(self._budget, peer_of(request.scope)) as reservation:
                return kind.model_validate_json(await read_body(request.scope, request.receive, reservation) or b"{}")
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
            raise ApiError(422, "invalid", f"{request.url.path}: {problems}") from error
