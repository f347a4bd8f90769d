"""One server and one browser for the tests of the page.

Playwright runs an event loop in this thread while its browser is open, so the browser is closed before other modules.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from agl.server.auth import BearerTokens, Grant, Right
from agl.server_thread import ServerThread
from agl.store import Store, open_store
from tests.node import folder_with
from tests.page.made import fill

TOKENS = {"reader-token": Grant(frozenset({Right.READ})), "agent-token": Grant(frozenset({Right.AGENT}))}
_FLAGS = ["--no-sandbox", "--disable-quic", "--disable-background-networking"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    folder = tmp_path_factory.mktemp("page")
    store = open_store(f"sqlite:///{folder}/agl.db")
    fill(store, folder)
    yield store
    store.close()


@pytest.fixture
def empty() -> Iterator[Store]:
    store = open_store("memory://")
    yield store
    store.close()


@pytest.fixture(scope="module")
def url(store: Store) -> Iterator[str]:
    with ServerThread(store, port=0, otlp_http_port=0) as server:
        yield server.base_url


@pytest.fixture(scope="module")
def guarded_url(store: Store) -> Iterator[str]:
    """The same store on a server that has tokens."""
    with ServerThread(store, port=0, otlp_http_port=0, tokens=BearerTokens(TOKENS)) as server:
        yield server.base_url


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=30_000)  # A busy machine draws a page late.
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=_FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A tab of a browser without cookies. The test fails if a page logs an error or breaks its policy."""
    context = browser.new_context()
    page = context.new_page()
    errors: list[str] = []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("dialog", lambda dialog: errors.append(f"dialog: {dialog.message}"))
    yield page
    # A page asks its server every few seconds, and going to another page aborts that.
    found = [error for error in errors if not error.startswith(("htmx:sendAbort", "htmx:sendError"))]
    context.close()
    assert not found


@pytest.fixture(scope="module")
def axe() -> Path:
    """The script of axe-core, which finds what people with disabilities cannot use."""
    return folder_with("axe", Path(__file__).parent) / "node_modules/axe-core/axe.min.js"
