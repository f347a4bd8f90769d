"""`agl init`: what it writes trains by the commands that it prints, and replaces nothing."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from agl.cli import main
from tests.flows.test_docs import ROOT, read_blocks


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)


def commands_of(output: str) -> list[list[str]]:
    """The indented lines of `output`, without their comments."""
    return [shlex.split(line, comments=True) for line in output.splitlines() if line.startswith("  ")]


@pytest.mark.parametrize("framework", ["autogen", "plain"])  # The test of docs/06 runs that of langgraph.
def test_an_example_trains_by_the_commands_that_are_printed(framework: str, capsys: pytest.CaptureFixture[str]) -> None:
    name = f"first_{framework}"
    assert main(["init", "--framework", framework, name]) == 0
    commands = commands_of(capsys.readouterr().out)
    assert [command[:2] for command in commands] == [["agl", "sft"], ["agl", "train"], ["agl", "inspect"]]
    for command in commands:
        assert main(command[1:]) == 0
    assert f"rollout {name}-00004-" in capsys.readouterr().out
    last = json.loads(Path("runs", name, "metrics.jsonl").read_text().splitlines()[-1])
    assert last["metrics"]["calls"] == 16 and last["metrics"]["calls/trained"] > 0


def test_the_page_on_examples_shows_the_files_of_langgraph() -> None:
    blocks = {block.file: block for block in read_blocks(ROOT / "docs/06-write-your-own-example.md") if block.file}
    assert main(["init", "--framework", "langgraph", "colours"]) == 0
    written = {str(path): f"# {path}\n{path.read_text()}" for path in Path("colours").iterdir()}
    assert {name: block.code for name, block in blocks.items() if name} == written


def test_every_example_is_linted_as_our_own_code() -> None:
    for framework in ("autogen", "langgraph", "plain"):
        assert main(["init", "--framework", framework, f"first_{framework}"]) == 0
    for check in (["check"], ["format", "--check"]):
        command = [sys.executable, "-m", "ruff", *check, "--config", str(ROOT / "pyproject.toml"), "."]
        subprocess.run(command, check=True, capture_output=True)


def test_a_folder_elsewhere_has_commands_for_its_parent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agl.cli.init.find_spec", lambda name: None)  # Nothing is installed.
    assert main(["init", "some where/mine"]) == 0
    install, *commands = commands_of(capsys.readouterr().out)
    assert install == ["pip", "install", "agl-langchain[instruments]", "agl-trainer"]
    assert [command[:4] for command in commands] == [["cd", str(tmp_path / "some where"), "&&", "agl"]] * 3


def test_a_name_that_cannot_be_imported_and_a_folder_in_use_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    Path("used").mkdir()
    Path("used/notes.txt").write_text("mine")
    Path("file").write_text("mine")
    for folder, why in {
        "my-agent": "'my-agent' cannot be the name of a Python package",
        "class": "'class' cannot be the name of a Python package",
        "json": "'json' is the name of an installed module",
        "agl": "'agl' is the name of an installed module",
        "used": "used exists, and is no empty folder",
        "file": "file exists, and is no empty folder",
        "file/mine": "file/mine/agent.py: Not a directory; choose another folder",
    }.items():
        assert main(["init", folder]) == 2
        assert why in capsys.readouterr().err
    assert [path.name for path in Path("used").iterdir()] == ["notes.txt"]
