"""`agl canary`: what starts, what is refused with what to do, and what the history keeps."""

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from agl.canary.history import last_event
from agl.cli import main
from agl.store import Resource, open_store

CONFIG = """\
store_uri: sqlite:///shop.db
agent_roles: {planner: {}, writer: {}, fixer: {adapter: writer}, judge: {frozen: true}}
canary: {fraction: 0.2, promote: {days: 2}}
"""
START = ("start", "--run", "shop", "--config", "shop.yaml")
CURRENT = ("--current", "planner@12", "--current", "writer@12", "--current", "fixer=base")
Agl = Callable[..., tuple[int, str, str]]


@pytest.fixture
def agl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Agl:
    """Runs `agl canary`; returns exit code, output and errors."""
    monkeypatch.chdir(tmp_path)
    Path("shop.yaml").write_text(CONFIG, encoding="utf-8")
    with closing(open_store("sqlite:///shop.db")) as store:
        for name, version in (("planner", 12), ("planner", 13), ("writer", 13)):
            store.put_resource(Resource(f"shop/{name}", version, f"adapters/{name}@{version}"))

    def run(*arguments: str) -> tuple[int, str, str]:
        given = arguments if "--config" in arguments else (*arguments, "--store", "sqlite:///shop.db")
        code = main(["canary", *given])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_a_canary_starts_with_the_newest_version_of_each_role_and_ends_in_the_history(agl: Agl) -> None:
    code, out, _ = agl(*START, *CURRENT)
    assert code == 0 and "planner@13 for planner@12, writer@13 for writer@12, writer@13 for base" in out
    with closing(open_store("sqlite:///shop.db")) as store:
        event = last_event(store)
    assert event is not None and event.canary.shares[0].fraction == 0.2
    assert event.canary.candidate == {"planner": "planner@13", "writer": "writer@13", "fixer": "writer@13"}
    assert agl(*START, "--fraction", "0.5")[0] == 0
    code, out, _ = agl("status")
    assert code == 1 and "no production rollout has called planner, writer, fixer" in out
    assert agl("promote", "--reason", "as agreed")[0] == 0
    assert agl("rollback")[0] == 0
    events = json.loads(agl("history", "--json")[1])
    assert [event["kind"] for event in events] == ["started", "raised", "promoted", "rolled_back"]
    assert events[2]["versions"]["planner"] == "planner@13" and events[2]["reason"] == "as agreed"
    assert events[3]["versions"] == events[0]["versions"] == {
        "planner": "planner@12", "writer": "writer@12", "fixer": "base",
    }  # fmt: skip
    assert (
        events[2]["evidence"]["wealth"]["better"] == 1 and events[2]["by"] and len(agl("history")[1].splitlines()) == 4
    )
    code, out, _ = agl("status", "--json")
    assert json.loads(out)["kind"] == "rolled_back"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((*START, "planner@14", "writer@13", *CURRENT), "published no planner@14: its newest version is planner@13"),
        ((*START, "planner@12", "writer@13", *CURRENT), "the candidate planner@12 is the version that answers planner"),
        ((*START, "planner@13", *CURRENT), "leaves out writer, fixer: the roles of a run were trained together"),
        ((*START,), "does not know which version answers planner now: add --current planner@N"),
        ((*START, "--current", "12"), "--current is '12', expected ROLE@N, such as planner@12, or ROLE=MODEL"),
        ((*START, *CURRENT, "--fraction", "1"), "--fraction: canary.fraction: Input should be less than 1"),
        (("start", "--run", "shop"), "no candidate: name one, such as planner@13"),
        (("start", "planner@13", "--run", "shp"), "run 'shp' published no adapter of 'planner'"),
        (("status",), "the store has no canary: begin one with `agl canary start`"),
        (("promote",), "no canary runs: begin one with `agl canary start`"),
        (("rollback",), "no canary runs, and none was promoted last"),
    ],
)
def test_what_cannot_be_is_refused_with_what_to_do(agl: Agl, arguments: tuple[str, ...], said: str) -> None:
    code, _, error = agl(*arguments)
    assert code == 2 and said in error


def test_only_one_canary_runs_and_its_fraction_only_grows(agl: Agl) -> None:
    agl(*START, *CURRENT)
    assert "two at a time would mix their effects" in agl("start", "planner@12", "--run", "shop")[2]
    assert "give a larger fraction" in agl(*START)[2]
    assert "canary 0" not in agl("history")[2]
    agl("rollback")
    assert "by the history of the store planner@12 does" in agl(*START, "--current", "planner@11")[2]


def test_a_canary_of_another_project_is_refused_because_no_gateway_would_follow_it(agl: Agl) -> None:
    code, _, err = agl(*START, *CURRENT, "--store", "sqlite:///shop.db?project=bar")
    assert code == 2 and "is the store of project bar: gateways send rollouts of project default only" in err
