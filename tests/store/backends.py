"""The backends on which the store's contract is tested. A new backend adds one entry to `BACKENDS`."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from starlette.applications import Starlette
from starlette.routing import Mount

from agl.config.section import DEFAULT_PROJECT
from agl.server.app_thread import AppThread
from agl.store import open_store
from agl.store.http.routes import StoreApi

NewUri = Callable[[], str]
"""Returns the URI of an empty store on each call."""


@dataclass(frozen=True, slots=True)
class Backend:
    name: str
    start: Callable[[Path], AbstractContextManager[NewUri]]
    """Runs the server, once for all tests, with its files in an empty folder."""
    is_shared: bool = True
    """Whether several stores opened with the same URI, in any process, share their data."""
    past: str = ""
    """Name of its stores of past schemas in `old_stores.PAST`, if it has any of its own."""


@contextmanager
def start_sqlite(folder: Path) -> Iterator[NewUri]:
    numbers = itertools.count()
    yield lambda: f"sqlite:///{folder}/{next(numbers)}.db"


@contextmanager
def start_memory(folder: Path) -> Iterator[NewUri]:
    yield lambda: "memory://"


@contextmanager
def start_postgres(folder: Path) -> Iterator[NewUri]:
    from tests.store.postgres_server import running_postgres

    with running_postgres() as server:
        yield server.new_database


@contextmanager
def start_cassandra(folder: Path) -> Iterator[NewUri]:
    from tests.store.cassandra_server import running_cassandra

    with running_cassandra() as server:
        yield server.empty_keyspace


@contextmanager
def start_http(folder: Path) -> Iterator[NewUri]:
    """One server with a separate path for each store."""
    numbers, opened = itertools.count(), ExitStack()
    app, server = Starlette(), AppThread()
    url = server.add(app)

    def new_uri() -> str:
        number = next(numbers)
        store = opened.enter_context(closing(open_store(f"sqlite:///{folder}/{number}.db")))
        api = opened.enter_context(closing(StoreApi({DEFAULT_PROJECT: store})))
        app.router.routes.append(Mount(f"/{number}", routes=api.routes()))
        return f"{url}/{number}"

    with opened, server:
        yield new_uri


BACKENDS = (
    Backend("sqlite", start_sqlite, past="sqlite"),
    Backend("memory", start_memory, is_shared=False),
    Backend("postgresql", start_postgres, past="postgres"),
    Backend("cassandra", start_cassandra, past="cassandra"),
    Backend("http", start_http),
)
