"""The page's routes: templates, headers and the login. Every response forbids scripts and styles of other origins."""

import re
from collections.abc import Callable, Mapping
from http import HTTPStatus
from importlib.metadata import version
from typing import Any, Final, Protocol
from urllib.parse import parse_qs

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Match, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from agl.errors import AglError, InputError, TrajectoryError, UnknownIdError
from agl.inspection.report import PENDING, TRAINED
from agl.page.adapters import list_adapters
from agl.page.canary import CanaryView
from agl.page.comparison import Comparison, evaluations
from agl.page.groups import Group, list_groups
from agl.page.rollouts import Filters, RolloutView, full_text, list_page, token_view
from agl.page.runs import RUN, RunView, list_runs, run_names
from agl.page.shown import FILTERS, visible
from agl.server.auth import COOKIE, LOGIN, STATIC, BearerTokens, asks_for_page, project_of
from agl.store import Store, sqlite_path
from agl.trajectory import DropReason

_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
_HEADERS: Final = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",  # Without a referrer, the login form would have no origin.
    "cache-control": "no-store",
}
_PAGES: Final = (
    *(("Runs", "/runs"), ("Groups", "/groups"), ("Compare", "/compare"), ("Rollouts", "/rollouts")),
    *(("Adapters", "/adapters"), ("Health", "/health")),
)
_MAX_LOGIN_BYTES: Final = 4096
_COOKIE_S: Final = 30 * 86_400

Answer = Callable[[Request], Response]


class Server(Protocol):
    """The server that the page is of."""

    async def health(self) -> dict[str, Any]:
        """The number of spans and how fast it grows, the states of the engines, the length of the queue if any."""
        ...

    def live_versions(self) -> Mapping[str, str]:
        """By role the policy version to which the gateway sends its calls, where it was set."""
        ...


class _Unknown(Route):
    """Any other path, for browsers: clients of the API get an error as JSON."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        return super().matches(scope) if asks_for_page(scope) else (Match.NONE, {})


class Page:
    """The page over `stores`, by project, on `server`. A token of `tokens` that may read logs in, to its project."""

    def __init__(self, stores: Mapping[str, Store], tokens: BearerTokens, server: Server) -> None:
        self._stores = stores
        self._server = server
        self._tokens = tokens
        self._templates = Environment(
            loader=PackageLoader("agl.page"),
            autoescape=True,
            finalize=visible,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.filters |= FILTERS
        self._templates.globals |= {
            "version": version("agl-core"),
            "can_leave": bool(tokens),
            "pages": _PAGES,
            "outcomes": [TRAINED, PENDING, *DropReason],
        }

    def routes(self) -> list[BaseRoute]:
        answers: Mapping[str, Answer] = {
            "/": lambda request: RedirectResponse(
                "/runs" if self._store(request).query_resources(RUN) else "/rollouts"
            ),
            "/favicon.ico": lambda _: RedirectResponse(f"{STATIC}/icon.svg"),
            "/runs": self._runs,
            "/runs/view": self._run,
            "/runs/charts": self._charts,
            "/groups": self._groups,
            "/groups/view": self._group,
            "/compare": self._compare,
            "/adapters": self._adapters,
            "/adapters/canary": self._canary,
            "/rollouts": self._rollouts,
            "/rollouts/view": self._rollout,
            "/rollouts/tokens": self._call_tokens,
            "/rollouts/text": self._text,
        }
        pages = [Route(path, self._endpoint(answer)) for path, answer in answers.items()]
        pages.append(Route("/health", self._health))
        login = Route(LOGIN, self._login, methods=["GET", "POST"])
        logout = Route("/logout", self._log_out)
        static = Mount(STATIC, StaticFiles(packages=[("agl.page", "static")]))
        return [*pages, login, logout, static, _Unknown("/{path:path}", self._endpoint(self._unknown))]

    def _endpoint(self, answer: Answer) -> Answer:
        """`answer` with the headers; what is wrong with a request becomes a page that says so. Runs in a thread."""

        def respond(request: Request) -> Response:
            try:
                response = answer(request)
            except (UnknownIdError, TrajectoryError) as error:
                response = self._show("error.html", request, HTTPStatus.NOT_FOUND, message=str(error))
            except InputError as error:
                response = self._show("error.html", request, HTTPStatus.BAD_REQUEST, message=str(error))
            except AglError as error:
                response = self._show("error.html", request, HTTPStatus.SERVICE_UNAVAILABLE, message=str(error))
            response.headers.update(_HEADERS)
            return response

        return respond

    def _show(self, template: str, request: Request, status: int = HTTPStatus.OK, **values: Any) -> Response:
        text = self._templates.get_template(template).render({"store_uri": self._store(request).uri, **values})
        return HTMLResponse(text.encode(errors="replace"), status)

    def _unknown(self, request: Request) -> Response:
        raise UnknownIdError(f"there is no page {request.url.path}")

    def _store(self, request: Request) -> Store:
        return self._stores[project_of(request.scope)]

    def _adapters(self, request: Request) -> Response:
        store = self._store(request)
        adapters = list(list_adapters(store, self._server.live_versions()))
        return self._show("adapters.html", request, adapters=adapters, canary=CanaryView.of(store))

    def _canary(self, request: Request) -> Response:
        return self._show("canary.html", request, canary=CanaryView.now(self._store(request)))

    async def _health(self, request: Request) -> Response:
        health = await self._server.health()
        return await run_in_threadpool(self._endpoint(lambda request: self._show_health(request, health)), request)

    def _show_health(self, request: Request, health: Mapping[str, Any]) -> Response:
        store = self._store(request)
        path = sqlite_path(store.uri)
        size = path.stat().st_size if path and path.exists() else None
        return self._show("health.html", request, health=health, rollouts=store.count_rollouts(), size=size)

    def _rollouts(self, request: Request) -> Response:
        filters = Filters.of(request.query_params)
        store = self._store(request)
        page = list_page(store, filters, request.query_params.get("cursor"))
        is_part = request.headers.get("hx-request") == "true" and "cursor" in request.query_params
        template = "rollout_rows.html" if is_part else "rollouts.html"
        return self._show(template, request, page=page, filters=filters, runs=run_names(store))

    def _runs(self, request: Request) -> Response:
        return self._show("runs.html", request, runs=list_runs(self._store(request)))

    def _run(self, request: Request) -> Response:
        run = RunView.of(self._store(request), _required(request, "id"))
        part = "run_state.html" if request.headers.get("hx-request") == "true" else "run.html"
        return self._show(part, request, run=run, findings=run.findings(self._store(request)))

    def _charts(self, request: Request) -> Response:
        return JSONResponse(RunView.of(self._store(request), _required(request, "id")).charts())

    def _groups(self, request: Request) -> Response:
        run, cursor = request.query_params.get("run", ""), request.query_params.get("cursor")
        store = self._store(request)
        page = list_groups(store, run, cursor)
        is_part = request.headers.get("hx-request") == "true" and cursor is not None
        return self._show(
            "group_rows.html" if is_part else "groups.html", request, page=page, run=run, runs=run_names(store)
        )

    def _group(self, request: Request) -> Response:
        return self._show("group.html", request, group=Group.of(self._store(request), _required(request, "id")))

    def _compare(self, request: Request) -> Response:
        runs = [view.run for view in list_runs(self._store(request))]
        run, left, right = (request.query_params.get(name, "") for name in ("run", "left", "right"))
        run = run or next(
            (name for name in runs if len(evaluations(self._store(request), name)) > 1), next(iter(runs), "")
        )
        return self._show(
            "compare.html", request, runs=runs, comparison=Comparison.of(self._store(request), run, left, right)
        )

    def _rollout(self, request: Request) -> Response:
        store, shows_all = self._store(request), request.query_params.get("all") == "1"
        view = RolloutView.of(store, _required(request, "id"), shows_all)
        return self._show("rollout.html", request, view=view)

    def _call_tokens(self, request: Request) -> Response:
        tokens = token_view(self._store(request), _required(request, "id"), _required(request, "call"))
        template = "token_table.html" if request.query_params.get("as") == "table" else "tokens.html"
        return self._show(template, request, tokens=tokens)

    def _text(self, request: Request) -> Response:
        number = _required(request, "number")
        if re.fullmatch(r"\d{1,9}", number, re.ASCII) is None:  # Python converts no number of over 4,300 digits.
            raise InputError(f"number={number[:20]} is no number of a text; open it from the page of the rollout")
        text = full_text(self._store(request), _required(request, "id"), _required(request, "span"), int(number))
        return PlainTextResponse(visible(text).encode(errors="replace"))

    async def _login(self, request: Request) -> Response:
        given, target = "", request.query_params.get("next", "/")
        if request.method == "POST":
            body = b""
            async for part in request.stream():
                body += part
                if len(body) > _MAX_LOGIN_BYTES:
                    break
            given = parse_qs(body[:_MAX_LOGIN_BYTES].decode(errors="replace")).get("token", [""])[0].strip()
        if not target.startswith("/") or target.startswith(("//", "/\\")):
            target = "/"
        session = self._tokens.session(given) if given else None
        if session is None and self._tokens:
            status = HTTPStatus.UNAUTHORIZED if request.method == "POST" else HTTPStatus.OK
            was_refused = request.method == "POST"
            response = self._show("login.html", request, status, target=target, was_refused=was_refused, store_uri="")
        else:
            response = RedirectResponse(target, HTTPStatus.SEE_OTHER)
        if session is not None:
            is_https = request.url.scheme == "https"
            response.set_cookie(COOKIE, session, _COOKIE_S, httponly=True, samesite="strict", secure=is_https)
        response.headers.update(_HEADERS)
        return response

    async def _log_out(self, _: Request) -> Response:
        response = RedirectResponse(LOGIN, HTTPStatus.SEE_OTHER, _HEADERS)
        response.delete_cookie(COOKIE)
        return response


def _required(request: Request, name: str) -> str:
    """A parameter of the URL. Raises InputError without it."""
    value = request.query_params.get(name)
    if not value:
        raise InputError(f"the address lacks {name}=...; open the page from the list of rollouts")
    return value
