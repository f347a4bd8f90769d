"""Rollouts of a store as training data: found once each, filtered, grouped, and turned into SFT rows."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agl import semconv
from agl.config import SftTracesConfig, TracesConfig, TrafficSamplingConfig
from agl.errors import TrainingError
from agl.sampling import Sampler
from agl.span import Span
from agl.store import Store, open_store
from agl.store.span_row import SpanRow
from agl.store.traffic import TrafficStore
from agl.trajectory import DropReason
from agl_trainer.data.sft_examples import TraceLimits, examples_from_traces
from agl_trainer.rollout.traces import load_groups, read_traces, stored_groups
from tests.core.span_maker import OTHER_TRACE, chat, gateway_call, reward, span
from tests.trainer.rollout_maker import call, reward_on, trajectory

ROLES = ("writer", "fixer")
LIMITS = {role: TraceLimits(max_tokens=6, vocabulary_size=90, is_frozen=role == "fixer") for role in ROLES}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = open_store(f"sqlite:///{tmp_path / 'agl.db'}")
    yield store
    store.close()


def keep(store: Store, rollout_id: str, *, mode: str = "train", group_id: str | None = None, **tags: Any) -> None:
    named: dict[str, Any] = {semconv.ROLLOUT_ID: rollout_id, semconv.MODE: mode}
    named |= {semconv.GROUP_ID: group_id} if group_id else {}
    spans = [call("writer", **named), span(semconv.SPAN_ANNOTATION, named | tags)]
    store.append_spans(spans)


def found(store: Store, **traces: Any) -> list[str]:
    return [trajectory.rollout_id for trajectory in read_traces(store, TracesConfig(**traces))]


def test_rollouts_are_chosen_by_mode_and_tags(store: Store) -> None:
    keep(store, "a", group_id="g", team="shop")
    keep(store, "b", mode="prod", team="shop", year=2026)
    keep(store, "c", mode="eval", team="shop")
    keep(store, "d", group_id="g")
    store.append_spans([span("no call", {semconv.ROLLOUT_ID: "e"})])
    assert found(store) == ["a", "b", "d"]
    assert found(store, modes=["eval"]) == ["c"]
    assert found(store, tags={"team": "shop"}) == ["a", "b"]
    assert found(store, tags={"team": "shop", "year": 2026}) == ["b"]
    groups = stored_groups(store, TracesConfig())
    assert [(group.group_id, group.rollout_ids) for group in groups] == [("g", ("a", "d")), ("b", ("b",))]
    assert [made.rollout_id for made in load_groups(store, groups[:1])] == ["a", "d"]
    with pytest.raises(
        TrainingError, match=r"holds no rollout of mode eval with {'team': 'bar'} that made a model call"
    ):
        stored_groups(store, TracesConfig(modes=["eval"], tags={"team": "bar"}))


def test_groups_of_a_sampled_store_stand_for_those_that_were_left_out(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    """Chance keeps task-8 and not task-3, whose randomness is 0.94 and 0.09; the long one has no chance."""
    assert isinstance(store, TrafficStore)
    for number, (name, value, calls) in enumerate(
        [("rich", 0.9, 1), ("task-8", 0.1, 1), ("task-3", 0.1, 1), ("long", 0.1, 9)]
    ):
        named: dict[str, Any] = {semconv.ROLLOUT_ID: name, semconv.MODE: "prod"}
        spans = [call("writer", **named) for _ in range(calls)]
        trace = f"{number + 1:032x}"
        spans += [reward(value, named), span(semconv.SPAN_ROLLOUT, named)]
        store.append_pending([SpanRow.of(replace(one, trace_id=trace)) for one in spans], now_ns=10**18)
    config = TrafficSamplingConfig(base_rate=0.3, max_span_per_minute=8)
    assert Sampler(store, config).run_once(10**18 + 3600 * 10**9) == 4
    groups = stored_groups(store, TracesConfig())
    assert {group.group_id: group.represented for group in groups} == {"rich": 1, "task-8": pytest.approx(1 / 0.3)}
    assert "sampling left out 1 rollouts" in caplog.text and "training does not see any" in caplog.text


def test_an_implicit_rollout_is_found_once_although_its_call_has_another_trace(store: Store) -> None:
    """An agent with a callback handler but no `agl.rollout`, calling the gateway without `traceparent`."""
    answer = {semconv.GEN_AI_RESPONSE_ID: "chatcmpl-1"}
    asked, given = chat(attributes=answer), gateway_call(attributes=answer, trace_id=OTHER_TRACE)
    nameless = [replace(one, attributes=_without_rollout(one)) for one in (asked, given)]
    store.append_spans(nameless)
    assert len(store.rollout_ids()) == 2
    assert found(store) == [asked.trace_id]


def _without_rollout(span: Span) -> dict[str, Any]:
    return {name: value for name, value in span.attributes.items() if name != semconv.ROLLOUT_ID}


def test_examples_are_rows_that_earned_enough_and_every_other_call_has_its_reason() -> None:
    wanted = SftTracesConfig(min_reward=0.5)
    turns = call("writer", [3], prompt=[1]), call("writer", [5], prompt=[1, 3, 4])
    made = [
        trajectory("good", *turns, call("fixer"), call("judge"), reward_on(None, 1.0)),
        trajectory("bad", call("writer"), reward_on(None, 0.4)),
        trajectory("role", call("writer"), reward_on(None, 1.0), reward_on(None, 0.1, role="writer")),
        trajectory("unknown", call("writer")),
        trajectory("failed", call("writer"), reward_on(None, 1.0), failed=True),
        trajectory("long", call("writer", [7] * 9), reward_on(None, 1.0)),
        trajectory("other", call("writer", [99]), reward_on(None, 1.0)),
        trajectory("hosted", chat(attributes={semconv.ROLE: "writer"}), reward(1.0)),
    ]
    examples, dropped = examples_from_traces(made, wanted, LIMITS)
    (example,) = examples
    assert (example.role, list(example.token_ids), list(example.loss_mask)) == ("writer", [1, 3, 4, 5], [0, 1, 0, 1])
    assert [one.span_id for one in example.calls] == [turn.span_id for turn in turns]
    assert [(call.rollout_id, reason) for call, reason in dropped] == [
        ("good", DropReason.ROLE_FROZEN),
        ("good", DropReason.ROLE_NOT_TRAINED),
        ("bad", DropReason.REJECTED),
        ("role", DropReason.REJECTED),
        ("unknown", DropReason.NO_REWARD),
        ("failed", DropReason.FAILED_ROLLOUT),
        ("long", DropReason.TOO_LONG),
        ("other", DropReason.UNKNOWN_TOKENS),
        ("hosted", DropReason.NO_IDS),
    ]
    calls = sum(len(one.calls) for one in made)
    assert len(dropped) + sum(len(example.calls) for example in examples) == calls
    others = SftTracesConfig(roles=["fixer"])
    assert not examples_from_traces(made, others, LIMITS)[0]
    anything = examples_from_traces(made[3:4], SftTracesConfig(), LIMITS)[0]
    assert len(anything) == 1
