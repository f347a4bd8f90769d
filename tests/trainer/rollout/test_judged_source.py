"""Groups that a judge ranks: each rank is a dimension of the reward, with its cost and disagreement in the store."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from agl import semconv
from agl.cli.inspection import Inspection
from agl.span import Span
from agl.store import Store, open_store
from agl.trajectory import Trajectory, build_trajectory
from agl_trainer.rollout.judged_source import JudgedSource
from agl_trainer.rollout.sources import RolloutBatch
from tests.core.scripted_judge import ScriptedJudge, judge_of, longest_first
from tests.core.span_maker import gateway_call, reward, span
from tests.counted_reads import counted_reads


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = open_store(f"sqlite:///{tmp_path / 'agl.db'}")
    yield store
    store.close()


class FixedSource:
    """Draws the same rollouts of the store each time."""

    def __init__(self, store: Store, names: Sequence[str]) -> None:
        self.store, self.names = store, names
        self.prefetched: list[int] = []

    def draw(self, step: int, position: int, groups: range) -> RolloutBatch:
        return RolloutBatch([], [build_trajectory(self.store.query_spans(name)) for name in self.names])

    def prefetch(self, step: int) -> list[int]:
        self.prefetched.append(step)
        return []


def answered(role: str, text: str, named: dict[str, Any]) -> Span:
    messages = [{"role": "assistant", "parts": [{"type": "text", "content": text}]}]
    request = {"messages": [{"role": "user", "content": "Say much."}]}
    own = {semconv.GEN_AI_OUTPUT_MESSAGES: json.dumps(messages), semconv.GATEWAY_REQUEST: json.dumps(request)}
    return gateway_call(role=role, attributes=named | own)


def keep(
    store: Store, name: str, texts: dict[str, str], *rewards: Span, group: str = "g", failed: bool = False
) -> None:
    named = {semconv.ROLLOUT_ID: name, semconv.GROUP_ID: group, semconv.ATTEMPT_ID: f"{name}-a1", semconv.MODE: "train"}
    whole = span(semconv.SPAN_ROLLOUT, named, status="error" if failed else "unset")
    store.append_spans([whole, *(answered(role, text, named) for role, text in texts.items())])
    store.append_spans([Span(**{**_fields(made), "attributes": {**made.attributes, **named}}) for made in rewards])


def _fields(made: Span) -> dict[str, Any]:
    names = ("trace_id", "span_id", "parent_id", "name", "start_ns", "end_ns")
    return {name: getattr(made, name) for name in names}


def rewards_of(made: Trajectory, role: str | None = None) -> list[tuple[float, dict[str, float]]]:
    return [(one.value, one.dimensions) for one in made.rewards if one.role == role]


def test_each_rollout_of_a_group_gets_its_rank_beside_its_earlier_dimensions(store: Store) -> None:
    goal = {f"{semconv.REWARD_PREFIX}goal": 1.0}
    keep(store, "r1", {"writer": "short"}, reward(1.0, goal))
    keep(store, "r2", {"writer": "quite long"}, reward(0.5))
    keep(store, "r3", {"writer": "middling"})
    keep(store, "failed", {"writer": "the longest of them all"}, failed=True)
    keep(store, "alone", {"writer": "x"}, group="h")
    source = FixedSource(store, ["r1", "r2", "r3", "failed", "alone"])
    with ScriptedJudge(longest_first) as server, counted_reads() as reads:
        drawn = JudgedSource(source, judge_of(server), store).draw(0, 0, range(1))
    assert reads == [*[1] * 5, 3, 3]  # of the source below, to judge, and with the judgement
    by_name = {made.rollout_id: made for made in drawn.trajectories}
    assert rewards_of(by_name["r1"])[-1] == (0.5, {"goal": 1.0, "judge": 0.0})
    assert rewards_of(by_name["r2"])[-1] == (0.75, {"reward": 0.5, "judge": 1.0})
    assert rewards_of(by_name["r3"]) == [(0.5, {"judge": 0.5})]
    assert rewards_of(by_name["failed"]) == rewards_of(by_name["alone"]) == []
    assert drawn.metrics == {
        "judge/groups": 1.0,
        "judge/failed": 0.0,
        "judge/input_tokens": 200.0,
        "judge/output_tokens": 14.0,
        "judge/disagreement": 0.0,
    }
    assert "<task>\n[user] Say much.\n</task>" in server.requests[0]["messages"][1]["content"]
    (judgement,) = (one for one in store.query_spans("r1") if one.name == semconv.SPAN_JUDGE)
    assert judgement.attributes[semconv.JUDGE_DISAGREEMENT] == 0.0
    assert judgement.attributes[semconv.GEN_AI_USAGE_INPUT_TOKENS] == pytest.approx(200 / 3)
    assert "reward 0.5 (goal 1, judge 0)" in Inspection(store.query_spans("r1")).text()
    # Judged again: the earlier rank is replaced, not counted as another dimension.
    with ScriptedJudge(longest_first) as server:
        again = JudgedSource(source, judge_of(server), store).draw(0, 0, range(1)).trajectories
    assert rewards_of(again[1])[-1] == (0.75, {"reward": 0.5, "judge": 1.0})


def test_each_role_is_ranked_by_its_own_calls(store: Store) -> None:
    keep(store, "r1", {"writer": "long answer", "fixer": "no"})
    keep(store, "r2", {"writer": "short", "fixer": "much better"})
    keep(store, "r3", {"writer": "middling", "judge": "nothing to fix"})
    source = FixedSource(store, ["r1", "r2", "r3"])
    weights = {"judge": 2.0, "goal": 1.0}
    with ScriptedJudge(longest_first) as server:
        judged = JudgedSource(source, judge_of(server), store, ["writer", "fixer"], weights)
        made = judged.draw(0, 0, range(1)).trajectories
        judged.prefetch(4)
    assert [rewards_of(one, "writer")[0][0] for one in made] == [2.0, 0.0, 1.0]
    assert [rewards_of(one, "fixer") for one in made] == [[(0.0, {"judge": 0.0})], [(2.0, {"judge": 1.0})], []]
    assert all(rewards_of(one) == [] for one in made)
    assert source.prefetched == [4]


def test_a_group_that_is_not_judged_keeps_its_rewards(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    keep(store, "r1", {"writer": "a"}, reward(1.0))
    keep(store, "r2", {"writer": "b"})
    with ScriptedJudge(lambda *_: "no idea") as server:
        drawn = JudgedSource(FixedSource(store, ["r1", "r2"]), judge_of(server), store).draw(0, 0, range(1))
    assert [rewards_of(made) for made in drawn.trajectories] == [[(1.0, {})], []]
    assert (drawn.metrics["judge/groups"], drawn.metrics["judge/failed"]) == (0, 1)
    assert "group g is not judged: the judge at" in caplog.text
