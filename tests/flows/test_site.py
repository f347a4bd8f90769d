"""The site of the documentation: its generated pages are those of the code, and it builds without a warning."""

import re
import shlex
import subprocess
import sys
from typing import Any

import pytest
import yaml

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


def test_the_site_builds_without_a_warning() -> None:
    assemble()
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    start = (ROOT / "build/site/index.html").read_text(encoding="utf-8")
    assert 'href="configuration/"' in start and 'src="images/' in start
    assert "emit_reward" in (ROOT / "build/site/api/index.html").read_text(encoding="utf-8")
