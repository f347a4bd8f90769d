"""The code of README and docs runs as a reader would run it, page by page, against real servers on loopback.

The Python blocks of a page form one script. A Python or YAML block that starts with `# some/file` is written to that
file instead. The lines of the shell blocks then run in the folder of these files. Commands that take minutes or do not
end are only parsed. Commands other than `agl` are not run; different tests cover them.
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from openai import OpenAI

from agl.cli import _parser
from agl.config import Config
from agl.gateway.dialect.messages import Messages
from agl.gateway.dialect.responses import Responses
from agl.gateway.dialect.translated import Translated
from agl.server_thread import ServerThread
from agl.store import open_store
from agl.trajectory import DropReason
from tests.core.fake_engine import FakeEngine

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/RESULTS.md")),
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("packages/*/README.md")),
    *sorted(ROOT.glob("examples/*/README.md")),
]
LANGUAGES = {"python", "sh", "yaml", "json", "text"}
ROLES = ("planner", "executor")

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"# (\S+\.(?:py|yaml))\n")
_RUN = re.compile(
    r"opentelemetry-instrument |agl (config|inspect|rollouts|spans|store|trajectories)\b|agl (sft|train) colours/"
)
_LINK = re.compile(r"\[[^]]*\]\(([^)#:]*)(?:#([^)]*))?\)")
_SOURCE = re.compile(r"`([\w/.-]+\.(?:py|yaml|toml|md|txt))`")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block; `line` is the number of its first line."""

    language: str
    code: str
    line: int

    @property
    def file(self) -> str | None:
        """Name of the file that the block represents, or None."""
        name = _FILE.match(self.code)
        return name[1] if name else None


def read_blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [Block(m[1], m[2], text.count("\n", 0, m.start(2)) + 1) for m in _BLOCK.finditer(text)]


@dataclass(frozen=True, slots=True)
class Desk:
    """The environment in which a reader tries a page: a folder with the examples, and a server on separate ports."""

    folder: Path
    server: ServerThread

    def script(self, blocks: list[Block]) -> str:
        """One script from `blocks`, with the ports of this server. Each block keeps its line numbers for tracebacks."""
        lines: list[str] = []
        for block in blocks:
            lines += [""] * (block.line - 1 - len(lines)) + block.code.splitlines()
        source = "\n".join(lines)
        for default, url in (("8400", self.server.base_url), ("4318", self.server.otlp_url)):
            source = source.replace(f"http://localhost:{default}", url)
        return source

    def run(self, *command: str) -> str:
        """Run `command`, assert that it succeeds, and return its standard error."""
        done = subprocess.run(command, cwd=self.folder, env=self._environment(), capture_output=True, timeout=120)
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout.decode()}\n{done.stderr.decode()}"
        return done.stderr.decode()

    def _environment(self) -> dict[str, str]:
        return os.environ | {
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "OPENAI_BASE_URL": f"{self.server.base_url}/v1",
            "OPENAI_API_KEY": "none",
            "OTEL_EXPORTER_OTLP_ENDPOINT": self.server.otlp_url,
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    """The store has one rollout, so that `--last` finds one."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    store = open_store(f"sqlite:///{tmp_path / 'agl.db'}")
    with ServerThread(store, port=0, otlp_http_port=0, upstream=FakeEngine(models=ROLES).app) as server:
        url = f"{server.base_url}/rollout/first/attempt/first-a1/v1"
        with OpenAI(base_url=url, api_key="none") as client:
            client.chat.completions.create(model=ROLES[0], messages=[{"role": "user", "content": "hello"}])
        yield Desk(tmp_path, server)
    store.close()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_tells_to_do_can_be_done(page: Path, desk: Desk) -> None:
    blocks = read_blocks(page)
    assert {block.language for block in blocks} <= LANGUAGES
    for block in blocks:
        if block.file:
            _write(desk.folder / block.file, block.code)
    script = [block for block in blocks if block.language == "python" and not block.file]
    if script:
        _write(desk.folder / page.name, desk.script(script))
        assert desk.run(sys.executable, page.name) == ""
    for block in blocks:
        if block.language == "yaml":
            Config.parse(yaml.safe_load(block.code))
        elif block.language == "sh":
            _follow(block.code, desk)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _follow(code: str, desk: Desk) -> None:
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if _RUN.match(line):
            desk.run("bash", "-c", line)
        elif words[:1] == ["agl"]:
            _parser(words[1:]).parse_args(words[1:])
            missing = [word for word in words if word.endswith(".yaml") and not (desk.folder / word).exists()]
            assert not missing


def test_links_lead_somewhere() -> None:
    broken = {
        f"{page.relative_to(ROOT)}: {path}#{anchor}"
        for page in PAGES
        for path, anchor in _LINK.findall(page.read_text(encoding="utf-8"))
        if not _leads(page.parent / path if path else page, anchor)
    }
    assert not broken


def _leads(target: Path, anchor: str) -> bool:
    if not anchor:
        return target.exists()
    titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
    return anchor in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


def test_files_that_are_named_exist() -> None:
    folders = [ROOT / name for name in ("benchmarks", "deploy", "docs", "examples", "packages", "tests")]
    files = [*ROOT.glob("*.*"), *(file for folder in folders for file in folder.rglob("*.*"))]
    missing = {
        f"{page.relative_to(ROOT)}: {name}"
        for page in PAGES
        for name in _SOURCE.findall(page.read_text(encoding="utf-8"))
        if not any(str(file).endswith(f"/{name.removeprefix('../')}") for file in files)
    }
    assert not missing


def table(page: str, heading: str) -> list[list[str]]:
    """Cells of all rows of the table whose first column has the title `heading`."""
    text = (ROOT / page).read_text(encoding="utf-8")
    rows = re.search(rf"^\| {heading} \|.*\n\|[-|]*\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert rows
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[1].splitlines()]


def test_every_reason_why_a_call_does_not_train_is_explained() -> None:
    page = [row[0].strip("`") for row in table("docs/07-troubleshooting.md", "reason")]
    assert sorted(page) == sorted(DropReason)


@pytest.mark.parametrize("api", [Messages, Responses])
def test_the_table_of_a_translated_api_has_every_field(api: type[Translated]) -> None:
    page = table("docs/04-gateway.md", f"field of `{api.api}`")
    assert page == [[f"`{name}`", str(field.treatment), field.note] for name, field in api.fields.items()]
