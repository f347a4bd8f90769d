"""The site of the documentation: its generated pages are those of the code, it builds without a warning, and it works
in a browser without network."""

import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit

import pytest
import yaml
from playwright.sync_api import Page, expect

from agl.cli import _parser
from docs.generate import ROOT, assemble, reference_pages, site_pages


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return reference_pages()


def test_the_pages_that_come_from_the_code_are_up_to_date(pages: dict[str, str]) -> None:
    old = [name for name, text in pages.items() if (ROOT / "docs" / name).read_text(encoding="utf-8") != text]
    assert not old, f"run `.venv/bin/python -m docs.generate` and commit {old}"


def test_every_key_attribute_and_option_has_a_meaning(pages: dict[str, str]) -> None:
    empty = [line for name, text in pages.items() for line in text.splitlines() if line.endswith("|  |")]
    assert [line for line in empty if not re.match(r"\| `[\w.]+` \| `(SPAN|OPERATION)_", line)] == []


def test_the_examples_of_commands_parse(pages: dict[str, str]) -> None:
    lines = re.findall(r"^agl (.*)$", pages["cli.md"], re.MULTILINE)
    assert len(lines) > 20
    for line in lines:
        words = shlex.split(line.split(" > ")[0])
        _parser(words).parse_args(words)


def test_every_page_is_in_the_navigation() -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(places_of(config["nav"])) == sorted(site_pages().values())


def places_of(entry: Any) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    return [place for part in (entry.values() if isinstance(entry, dict) else entry) for place in places_of(part)]


@pytest.fixture(scope="module")
def site() -> Path:
    """The folder of the built site."""
    assemble()
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return ROOT / "build/site"


def test_the_site_builds_without_a_warning(site: Path) -> None:
    start = (site / "index.html").read_text(encoding="utf-8")
    assert 'href="configuration/"' in start and 'src="images/' in start
    assert "emit_reward" in (site / "api/index.html").read_text(encoding="utf-8")


class _Anchors(HTMLParser):
    """The ids of a page, and what it links to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids, self.links = {""}, set[str]()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids |= {value for name, value in attrs if name in ("id", "name") and value}
        self.links |= {value for name, value in attrs if name in ("href", "src") and value}


def test_no_link_inside_the_site_is_dead(site: Path) -> None:
    pages = {
        f"/{file.relative_to(site).as_posix()}".removesuffix("index.html"): _Anchors(file.read_text(encoding="utf-8"))
        for file in site.rglob("*.html")
    }
    links = {(path, urlsplit(urljoin(f"site://{path}", link))) for path, page in pages.items() for link in page.links}
    assert [
        f"{path}: {to.geturl()}"
        for path, to in sorted(links)
        if to.scheme == "site"
        if not (unquote(to.fragment) in pages[to.path].ids if to.path in pages else (site / to.path[1:]).is_file())
    ] == []


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def site_url(site: Path) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(("width", "scheme"), [(360, "dark"), (1600, "light")])
def test_search_finds_a_page_without_network(page: Page, site_url: str, axe: Path, width: int, scheme: Any) -> None:
    requested: list[str] = []
    page.on("request", lambda request: requested.append(request.url))
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    page.set_viewport_size({"width": width, "height": 900})
    page.goto(site_url)
    expect(page.locator("h1")).to_contain_text("agl")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.evaluate(axe.read_text(encoding="utf-8"))
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
    serious = [each for each in found if each["impact"] in ("serious", "critical")]
    assert not serious, [(each["id"], each["nodes"][0]["html"]) for each in serious]
    page.locator(".md-search__button:visible, label[for=__search]:visible").first.click()
    page.locator("input[aria-label=Search]").fill("agl canary rollback")
    page.locator("a[href*='#agl-canary-rollback']:visible").first.click()
    expect(page).to_have_url(re.compile("/cli/.*#agl-canary-rollback$"))
    assert all(url.startswith((site_url, "data:", "blob:")) for url in requested)
