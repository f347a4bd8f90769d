"""`agl rewards test`: stored rollouts under another scorer and other weights."""

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from agl import semconv
from agl.cli import main
from agl.rewards import Score
from agl.rewards.comparison import Comparison, Rescored
from agl.span import Span
from agl.store import Rollout, open_store
from tests.core.span_maker import gateway_call, reward, span

SCORERS = """
import asyncio

def goal(task, answer, rollout):
    return {"goal": float(answer["n"] == task["n"]), "size": answer["n"] / 10}

async def later(task, answer):
    await asyncio.sleep(0)
    return None if answer["n"] == 3 else answer["n"] / 10
"""


def stored(name: str, group: str, answer: Any, parts: dict[str, float]) -> list[Span]:
    """A rollout with its recorded answer and reward."""
    ids = {semconv.ROLLOUT_ID: name, semconv.GROUP_ID: group, semconv.MODE: "train"}
    trace = f"{abs(hash(name)):032x}"[:32]
    whole = span(semconv.SPAN_ROLLOUT, {semconv.ROLLOUT_ANSWER: json.dumps(answer)}, trace_id=trace)
    earned = {semconv.REWARD_PREFIX + part: value for part, value in parts.items()}
    spans = [whole, gateway_call(parent=whole, role="writer"), reward(sum(parts.values()) / 2, earned, parent=whole)]
    for each in spans:
        each.attributes.update(ids)
    return spans


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two groups of two rollouts: answers 1, 2 and 3, 4 of the tasks 2 and 3."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"{tmp_path.name}_scorers.py".replace("-", "_")).write_text(SCORERS, encoding="utf-8")
    with closing(open_store("sqlite:///agl.db")) as store:
        for number, (group, task) in enumerate((("a", 2), ("a", 2), ("b", 3), ("b", 3)), 1):
            store.enqueue_rollouts([Rollout(f"r{number}", {"n": task}, group_id=group)])
            parts = {"goal": float(number == task), "size": 1 - number / 10}
            store.append_spans(stored(f"r{number}", group, {"n": number}, parts))
    return tmp_path


def found(folder: Path, capsys: pytest.CaptureFixture[str], scorer: str | None, weights: str) -> dict[str, Any]:
    module = f"{folder.name}_scorers".replace("-", "_")
    train = f"train: {{model: tiny, reward: '{module}:{scorer}'}}\n" if scorer else ""
    (folder / "new.yaml").write_text(f"{train}rewards: {weights}\n", encoding="utf-8")
    code = main(["rewards", "test", "--config", "new.yaml", "--on", "last-100", "--json"])
    return json.loads(capsys.readouterr().out) | {"code": code}


def test_another_scorer_on_stored_answers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = found(folder, capsys, "goal", "{goal: 1.0, size: 1.0}")
    assert result["means"] == {
        "reward": {"old": pytest.approx(0.625), "new": pytest.approx(0.75)},
        "goal": {"old": 0.5, "new": 0.5},
        "size": {"old": pytest.approx(0.75), "new": pytest.approx(0.25)},
    }
    assert (result["rollouts"], result["groups"], result["missing"], result["code"]) == (4, 2, {"old": 0, "new": 0}, 0)
    assert (result["rank_correlation"], result["changed_groups"]) == (1.0, [])
    assert result["answers"] == {"recorded": 4}


def test_other_weights_on_stored_parts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = found(folder, capsys, None, "{goal: 0.0, size: 1.0}")
    assert result["means"]["reward"] == {"old": pytest.approx(0.625), "new": pytest.approx(0.75)}
    # Group a: the right answer is the larger one, so its order changes.
    (changed,) = result["changed_groups"]
    assert changed == {
        "group_id": "a",
        "rollouts": [
            {"rollout_id": "r2", "old": pytest.approx(0.9), "new": pytest.approx(0.8)},
            {"rollout_id": "r1", "old": pytest.approx(0.45), "new": pytest.approx(0.9)},
        ],
    }
    assert result["rank_correlation"] == 0.0
    result = found(folder, capsys, None, "{goal: 1.0}")
    assert (result["missing"]["new"], result["code"]) == (4, 1)
    (reason,) = result["reasons"]
    assert "reward dimension size has no weight" in reason


def test_missing_rewards_are_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = found(folder, capsys, "later", "{}")
    assert (result["missing"], result["reasons"], result["code"]) == (
        {"old": 0, "new": 1},
        {"the scorer returned None": 1},
        1,
    )
    assert main(["rewards", "test", "--config", "new.yaml", "--on", "last-2"]) == 1
    text = capsys.readouterr().out
    assert "2 rollouts, 0 groups" in text and "1 new reward missing: the scorer returned None" in text
    assert "rank correlation within groups: none varies" in text


@pytest.mark.parametrize("on", ["100", "last-0", "last-x"])
def test_what_is_no_number_of_rollouts(on: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["rewards", "test", "--config", "new.yaml", "--on", on])
    assert "expected last-1 or more" in (error := capsys.readouterr().err) or "is not last-N, e.g. last-100" in error


def test_rank_correlation_by_hand() -> None:
    """Ranks 0, 1.5, 1.5, 3 and 3, 1, 2, 0: covariance -4.5 over sqrt(4.5 * 5)."""
    pairs = [(0.0, 9.0), (1.0, 2.0), (1.0, 5.0), (7.0, 1.0)]
    made = [Rescored(str(i), "g", Score(old), Score(new)) for i, (old, new) in enumerate(pairs)]
    assert Comparison(made).rank_correlation() == pytest.approx(-4.5 / (4.5 * 5) ** 0.5)
    assert Comparison(made).changed_groups() == ["g"]
