"""The rollouts of a canary as their spans have them, and as sampling has them when it left the spans out."""

import time
from collections.abc import Sequence
from dataclasses import replace

import pytest

from agl import semconv
from agl.canary.history import Canary, Share
from agl.canary.observation import observe
from agl.canary.table import Sample
from agl.canary.verdict import judge_observed
from agl.config import CanaryConfig, TrafficSamplingConfig
from agl.sampling import Sampler
from agl.span import Span
from agl.store import open_store
from agl.store.span_row import rows_of
from agl.store.traffic import TrafficStore
from tests.core.span_maker import gateway_call, reward, span

SECOND = 10**9
DAY = 86_400 * SECOND
CANARY = Canary(
    id="c",
    candidate={"writer": "writer@4"},
    current={"writer": "writer@3"},
    shares=[Share(since_ns=0, fraction=0.1), Share(since_ns=50 * SECOND, fraction=0.3)],
    settings=CanaryConfig(),
)
ARM = {
    semconv.CANARY_ID: "c",
    semconv.CANARY_ARM: "candidate",
    semconv.CANARY_KEY: "00ff",
    semconv.CANARY_VERSION: "writer@4",
}


def rollout() -> list[Span]:
    """A root of 1.5 s, two calls of which one failed, a call of a role without candidate, and two rewards."""
    prod = {semconv.MODE: "prod"}
    root = replace(span(semconv.SPAN_ROLLOUT, prod, start=60 * SECOND), end_ns=60 * SECOND + 3 * SECOND // 2)
    of = {semconv.CANARY_ID: "c", semconv.CANARY_ARM: "candidate", semconv.CANARY_KEY: "00ff"}
    return [
        root,
        gateway_call(parent=root, start=60 * SECOND, version="judge@1", attributes=of),
        gateway_call(parent=root, start=61 * SECOND, version="writer@4", attributes=ARM),
        gateway_call(parent=root, start=62 * SECOND, version="writer@4", attributes=ARM, status="error"),
        reward(0.25, parent=root, start=63 * SECOND),
        reward(0.75, parent=root, start=64 * SECOND),
    ]


def seen(spans: Sequence[Span], base_rate: float | None = None) -> list[Sample]:
    """The samples of these spans; with `base_rate` after they were sampled with that."""
    store = open_store("memory://")
    assert isinstance(store, TrafficStore)
    if base_rate is None:
        store.append_spans(spans)
    else:
        store.append_pending([row for each in spans for row in rows_of(each)])
        config = TrafficSamplingConfig(base_rate=base_rate, reward_threshold=1, keep_failed=False)
        assert Sampler(store, config).run_once(time.time_ns() + 3600 * SECOND) == 1
        assert bool(base_rate) == any(span.name == semconv.SPAN_GATEWAY_CALL for span in store.query_spans("r-1"))
    found = observe(store, CANARY)
    store.close()
    assert not found.unproved
    return found.samples


def test_a_rollout_is_counted_alike_whether_sampling_keeps_it_or_leaves_it_out() -> None:
    expected = Sample(
        rollout_id="r-1",
        key="00ff",
        is_candidate=True,
        fraction=0.3,
        day="1970-01-01",
        ended_ns=62 * SECOND + SECOND // 4,
        latency_s=1.5,
        failed=True,
        reward=0.75,
        rewarded_ns=64 * SECOND,
    )
    assert seen(rollout()) == seen(rollout(), base_rate=1) == seen(rollout(), base_rate=0) == [expected]


@pytest.mark.parametrize("other", [{semconv.CANARY_ID: "an earlier one"}, {semconv.CANARY_VERSION: None}])
def test_rollouts_of_other_canaries_and_without_a_role_of_this_one_do_not_count(other: dict[str, str | None]) -> None:
    attributes = {name: value for name, value in (ARM | other).items() if value is not None}
    assert seen([gateway_call(version="writer@4", attributes=attributes)]) == []


def test_a_client_that_left_is_no_failure_of_the_version() -> None:
    left = gateway_call(version="writer@4", attributes=ARM | {semconv.ERROR_TYPE: "cancelled"}, status="error")
    assert [sample.failed for sample in seen([left])] == [False]


def test_the_evidence_is_the_same_whether_sampling_keeps_all_rollouts_or_none() -> None:
    """40 rollouts of each arm through a sampler to the verdict; of those that are left out, records are all that is."""
    sent: list[Span] = []
    for number in range(80):
        arm = ("candidate", "writer@4") if number % 2 else ("current", "writer@3")
        named = {semconv.ROLLOUT_ID: f"r-{number}", semconv.MODE: "prod"}
        called = named | ARM | {semconv.CANARY_ARM: arm[0], semconv.CANARY_KEY: f"{number:04x}"}
        start, trace = (100 + number) * SECOND, f"{number + 1:032x}"
        root = span(semconv.SPAN_ROLLOUT, named, start=start, trace_id=trace)
        call = gateway_call(
            parent=root,
            start=start,
            version=arm[1],
            trace_id=trace,
            attributes=called | {semconv.CANARY_VERSION: arm[1]},
        )
        earned = reward(0.5 + 0.4 * (number % 2), named, parent=root, start=start + SECOND // 2)
        sent += [root, call, replace(earned, trace_id=trace)]
    verdicts = []
    for base_rate in (1, 0):
        store = open_store("memory://")
        assert isinstance(store, TrafficStore)
        store.append_pending([row for each in sent for row in rows_of(each)])
        config = TrafficSamplingConfig(base_rate=base_rate, reward_threshold=2, max_span_per_minute=None)
        assert Sampler(store, config).run_once(time.time_ns() + 3600 * SECOND) == 80
        assert store.count_spans() == (320 if base_rate else 80)
        canary = CANARY.model_copy(update={"shares": [Share(since_ns=0, fraction=0.5)]})
        verdicts.append(judge_observed(observe(store, canary), canary, 10 * DAY))
        store.close()
    kept, left_out = verdicts
    assert left_out.evidence() == kept.evidence()
    ((current, candidate),) = [(day.current, day.candidate) for day in left_out.days]
    assert (current.rollouts, current.mean, candidate.rollouts) == (40, 0.5, 40)
    assert candidate.mean == pytest.approx(0.9) and left_out.wealth.better > 20
