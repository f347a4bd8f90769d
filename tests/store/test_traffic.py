"""Production traffic on every store: pending spans and decisions, and sampling from the first span to the last row."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from typing import Any

import pytest

from agl import semconv
from agl.config import TrafficSamplingConfig
from agl.errors import StoreError
from agl.sampling import Sampler
from agl.span import Span, Status
from agl.store import Rollout, Store, open_store
from agl.store.span_row import SpanRow
from agl.store.traffic import Intake, Pending, TrafficStore
from agl.trajectory import Sampled, SamplingReason, build_trajectory, read_sampled
from agl.trajectory.sampled import randomness
from benchmarks import sampling
from tests.store.backends import NewUri

S = 10**9
MINUTE = 60 * S
BASE_NS = 25_000_000 * MINUTE
CONFIG = TrafficSamplingConfig(max_span_per_minute=None)
LOW, HIGH = "task-3", "task-8"
"""Their randomness is 0.09 and 0.94 of the largest."""


@pytest.fixture
def traffic(new_uri: NewUri) -> Iterator[TrafficStore]:
    with closing(open_store(new_uri())) as store:
        assert isinstance(store, TrafficStore)
        yield store


def made(
    rollout: str | None,
    number: int,
    name: str = "step",
    *,
    trace: int = 0,
    parent: int | None = None,
    group: str | None = None,
    mode: str | None = "prod",
    status: Status = "unset",
    **attributes: Any,
) -> Span:
    """Span `number`; its trace is that of its hundred, unless `trace` says another."""
    named = {semconv.ROLLOUT_ID: rollout, semconv.GROUP_ID: group, semconv.MODE: mode} | attributes
    return Span(
        f"{trace or number // 100 + 1:032x}",
        f"{number + 1:016x}",
        f"{parent + 1:016x}" if parent is not None else None,
        name,
        BASE_NS + number,
        BASE_NS + number + 1,
        {key: value for key, value in named.items() if value is not None},
        status,
        resource={"service.name": "shop"},
    )


def whole(rollout: str, first: int, reward: float | None = None, status: Status = "unset", **more: Any) -> list[Span]:
    """A rollout of two calls that is over: its root, two calls with tokens, and a reward."""
    call = {semconv.GEN_AI_OPERATION_NAME: "chat", semconv.ROLE: "writer", semconv.POLICY_VERSION: "writer@3"}
    call |= {semconv.CANARY_ID: "c", semconv.CANARY_ARM: "current", semconv.CANARY_VERSION: "writer@3"}
    usage = {semconv.GEN_AI_USAGE_INPUT_TOKENS: 5, semconv.GEN_AI_USAGE_OUTPUT_TOKENS: 2}
    found = [made(rollout, first + n, "chat m", parent=first, **more, **call, **usage) for n in (1, 2)]
    if reward is not None:
        value = {semconv.REWARD_VALUE: reward, semconv.REWARD_PREFIX + "style": 0.5}
        found.append(made(rollout, first + 3, semconv.SPAN_REWARD, parent=first, **more, **value))
    return [*found, made(rollout, first, semconv.SPAN_ROLLOUT, status=status, **more)]


def append(store: TrafficStore, spans: list[Span], at_s: float = 0) -> None:
    store.append_pending(list(map(SpanRow.of, spans)), now_ns=BASE_NS + int(at_s * S))


def sample(store: TrafficStore, at_s: float, config: TrafficSamplingConfig = CONFIG) -> int:
    """One pass of a sampler that has just started."""
    return Sampler(store, config).run_once(BASE_NS + int(at_s * S))


def kept_spans(store: Store, rollout_id: str) -> int:
    return sum(span.name != semconv.SPAN_SAMPLED for span in store.query_spans(rollout_id))


def left_out(spans: list[Span]) -> Sampled | None:
    """The summary of a rollout of which nothing else is left."""
    assert all(span.name == semconv.SPAN_SAMPLED for span in spans)
    return read_sampled(spans)


def pending(store: TrafficStore) -> int:
    return len(store.list_pending().arrived_ns)


def test_a_pending_span_is_durable_and_apart_and_the_first_decision_stays(traffic: TrafficStore) -> None:
    spans = [made("r", n) for n in range(3)]
    append(traffic, spans, 1)
    found = traffic.list_pending()
    assert {at_ns - BASE_NS for at_ns in found.arrived_ns.values()} == {S} and len(found.arrived_ns) == 3
    assert found.now_ns > BASE_NS
    assert (traffic.count_spans(), traffic.rollout_ids(), traffic.query_spans("r")) == (0, [], [])
    places = list(found.arrived_ns)
    assert sorted(traffic.read_pending(places).values()) == sorted(SpanRow.of(span).otlp for span in spans)
    traffic.delete_pending(places[:2])
    assert list(traffic.read_pending(places)) == places[2:]

    assert traffic.decide({"a": "1", "b": "1"}) == {"a": "1", "b": "1"}
    assert traffic.decide({"b": "2", "c": "2"}) == {"b": "1", "c": "2"}
    traffic.append_spans([made("r", 7), made("other", 8), made(None, 9)])
    assert sorted(traffic.rollouts_of_trace(f"{1:032x}")) == ["other", "r"]
    traffic.gc(older_than_s=0, now_ns=found.now_ns + 3600 * S)
    assert traffic.decide({"b": "3"}) == {"b": "3"} and pending(traffic) == 1


def test_a_pending_span_is_a_heartbeat_and_only_production_waits(traffic: TrafficStore) -> None:
    traffic.enqueue_rollouts([Rollout("queued", None, mode="eval", unresponsive_s=3600)])
    leased = traffic.lease_rollout("worker")
    assert leased is not None
    before_ns = leased[1].heartbeat_ns
    attempt = {semconv.ATTEMPT_ID: leased[1].attempt_id}
    traffic.append_pending([SpanRow.of(made("queued", 1, **attempt))], now_ns=before_ns + 100 * S)
    assert traffic.query_attempts("queued")[0].heartbeat_ns == before_ns + 100 * S
    traffic.delete_pending(list(traffic.list_pending().arrived_ns))

    spans = [
        made("trained", 101, mode="train"),
        made(None, 102, mode=None),  # In the trace of a training.
        made("queued", 201, mode=None),  # Has the mode of the queued rollout.
        made("served", 301),
        made(None, 401, mode=None),  # Nobody states its mode: it is production.
    ]
    assert Intake(traffic).append_rows(list(map(SpanRow.of, spans))) == 5
    assert sorted(traffic.rollout_ids()) == ["queued", "trained"]
    assert (traffic.count_spans(), pending(traffic)) == (3, 2)


def test_rollouts_are_kept_or_left_out_whole_and_what_is_left_out_leaves_its_summary(traffic: TrafficStore) -> None:
    append(traffic, whole("good", 100, 0.9))
    append(traffic, whole("failed", 200, 0.1, "error"))
    append(traffic, whole(LOW, 300, 0.2))
    append(traffic, whole(HIGH, 400, 0.2))
    append(traffic, whole("g1", 500, 0.1, group=LOW) + whole("g2", 600, 0.9, group=LOW))
    assert (sample(traffic, 1), pending(traffic)) == (5, 0)
    assert [kept_spans(traffic, name) for name in ("good", "failed", LOW, HIGH, "g1", "g2")] == [4, 4, 0, 4, 4, 4]
    reasons = {name: read_sampled(traffic.query_spans(name)) for name in ("good", "failed", HIGH, "g1")}
    assert [each and (each.decision.reason, round(each.decision.probability, 3)) for each in reasons.values()] == [
        (SamplingReason.REWARD, 1.0),
        (SamplingReason.FAILED, 1.0),
        (SamplingReason.BASE_RATE, 0.3),
        (SamplingReason.REWARD, 1.0),
    ]
    assert build_trajectory(traffic.query_spans(HIGH)).inclusion == pytest.approx(0.3)
    assert build_trajectory(traffic.query_spans("g1")).reward == 0.1

    found = left_out(traffic.query_spans(LOW))
    assert found is not None and found.reward is not None
    assert (found.spans, found.calls, found.input_tokens, found.output_tokens) == (4, 2, 10, 4)
    assert (found.roles, found.versions, found.error, found.mode) == (("writer",), ("writer@3",), None, "prod")
    assert (found.reward.value, found.reward.dimensions) == (0.2, {"style": 0.5})
    # A canary reads its arm and its proof from the record in the place of the calls.
    (record,) = traffic.query_spans(LOW)
    canary = (semconv.CANARY_ID, semconv.CANARY_ARM, semconv.CANARY_VERSION, semconv.POLICY_VERSION)
    assert [record.text(name) for name in canary] == ["c", "current", "writer@3", "writer@3"]
    assert found.decision.describe() == "left out with probability 0.7: by chance (sampling.base_rate)"
    trajectory = build_trajectory(traffic.query_spans(LOW))
    assert (trajectory.reward, trajectory.calls, trajectory.mode) == (0.2, [], "prod")


def test_a_rollout_is_decided_at_its_end_with_its_reward_or_after_a_while(traffic: TrafficStore) -> None:
    append(traffic, whole(LOW, 100), 10)
    assert sample(traffic, 11.9) == 0
    append(traffic, [made(LOW, 103, semconv.SPAN_REWARD, parent=100, **{semconv.REWARD_VALUE: 0.8})], 11.95)
    assert (sample(traffic, 11.96), kept_spans(traffic, LOW)) == (1, 4)  # The reward came within the grace period.
    append(traffic, [made("endless", 201)], 10)
    append(traffic, [made("endless", 202)], 20)
    assert (sample(traffic, 49), sample(traffic, 50)) == (0, 1)
    append(traffic, whole("graced", 300), 60)
    assert (sample(traffic, 61.9), sample(traffic, 62)) == (0, 1)
    # A trace that no rollout names ends with its root.
    append(traffic, [made(None, 401, parent=400), made(None, 400, mode=None)], 70)
    assert (sample(traffic, 71.9), sample(traffic, 72)) == (0, 1)
    # The store knows that another attempt follows.
    traffic.enqueue_rollouts([Rollout("retried", None, mode="prod")])
    leased = traffic.lease_rollout("worker")
    assert leased is not None
    append(traffic, whole("retried", 500, 0.9, **{semconv.ATTEMPT_ID: leased[1].attempt_id}), 80)
    assert sample(traffic, 200) == 0
    traffic.cancel_rollouts(["retried"])
    assert Sampler(traffic, CONFIG).run_once(traffic.list_pending().now_ns) == 1


def test_a_late_span_follows_the_decision(traffic: TrafficStore) -> None:
    append(traffic, whole(LOW, 100, 0.2) + whole(HIGH, 200, 0.2))
    assert sample(traffic, 1) == 2
    for name, first in ((LOW, 100), (HIGH, 200)):
        late = made(name, first + 4, semconv.SPAN_REWARD, **{semconv.REWARD_VALUE: 1.0})
        append(traffic, [late, made(None, first + 5, parent=first, mode=None)], 5)
    append(traffic, [made("later", 300, semconv.SPAN_ROLLOUT, group=LOW)], 5)
    sample(traffic, 100)
    assert (pending(traffic), kept_spans(traffic, LOW), kept_spans(traffic, HIGH)) == (0, 0, 6)
    found = left_out(traffic.query_spans(LOW))
    assert found is not None and (found.spans, found.reward and found.reward.value) == (6, 1.0)


def test_a_late_span_without_the_group_follows_the_decision_on_the_group(traffic: TrafficStore) -> None:
    append(traffic, [made(HIGH, 100, semconv.SPAN_ROLLOUT, group=LOW)])
    assert sample(traffic, 5) == 1
    append(traffic, [made(HIGH, 101, semconv.SPAN_REWARD, parent=100, **{semconv.REWARD_VALUE: 0.9})], 6)
    assert (sample(traffic, 100), pending(traffic)) == (1, 0)
    found = left_out(traffic.query_spans(HIGH))
    assert found is not None and (found.decision.unit, found.spans, found.group_id) == (LOW, 2, LOW)


def test_a_record_that_a_sender_invents_is_no_decision(traffic: TrafficStore) -> None:
    claims: list[dict[str, Any]] = [{}, {semconv.SAMPLED_KEPT: "no"}]
    whole_claim: dict[str, Any] = {semconv.SAMPLED_UNIT: "r", semconv.SAMPLED_REASON: "base_rate"}
    claims += [whole_claim | {semconv.SAMPLED_KEPT: True, semconv.SAMPLED_THRESHOLD: "1" + 14 * "0"}]  # p = 0
    for number, claim in enumerate(claims):
        append(traffic, [made(HIGH, 100 + number, semconv.SPAN_SAMPLED, **claim)])
    append(traffic, whole(HIGH, 200))
    assert sample(traffic, 5) == 1
    trajectory = build_trajectory(traffic.query_spans(HIGH))
    assert trajectory.sampled is not None and trajectory.sampled.decision.unit == HIGH


def test_a_span_is_not_taken_for_one_that_a_sampler_has_decided_before(traffic: TrafficStore) -> None:
    sampler = Sampler(traffic, CONFIG)
    for name, first in ((LOW, 100), (HIGH, 200)):
        append(traffic, whole(name, first, 0.2))
        assert (sampler.run_once(BASE_NS + S), pending(traffic)) == (1, 0)
    assert (kept_spans(traffic, LOW), kept_spans(traffic, HIGH)) == (0, 4)


def test_a_gateway_call_in_a_trace_of_its_own_is_decided_with_the_rollout_that_asked(traffic: TrafficStore) -> None:
    for name, first in ((LOW, 100), (HIGH, 200)):
        response = {semconv.GEN_AI_RESPONSE_ID: f"answer-{name}"}
        call = made(None, first + 50, semconv.SPAN_GATEWAY_CALL, trace=first, mode=None, **response)
        append(traffic, [*whole(name, first, 0.2), made(name, first + 9, "chat m", **response), call])
    assert (sample(traffic, 1), pending(traffic)) == (2, 0)
    assert (kept_spans(traffic, LOW), kept_spans(traffic, HIGH)) == (0, 6)
    response = {semconv.GEN_AI_RESPONSE_ID: "answer-early"}
    append(traffic, [made(None, 350, semconv.SPAN_GATEWAY_CALL, mode=None, **response)], 10)
    assert sample(traffic, 20) == 0  # The framework sends its span of the request later.
    append(traffic, [made("task-0", 409, "chat m", **response), made("task-0", 410, semconv.SPAN_ROLLOUT)], 21)
    assert (sample(traffic, 24), pending(traffic), kept_spans(traffic, f"{4:032x}")) == (1, 0, 0)


def test_a_window_keeps_the_largest_randomness_whoever_decides_and_however_often_it_restarts(
    traffic: TrafficStore,
) -> None:
    """20 rollouts of 3 spans that only chance keeps, with a limit of 13 spans: the four with the largest R."""
    config = TrafficSamplingConfig(base_rate=1, max_span_per_minute=13)
    names = [f"task-{number}" for number in range(20)]
    ordered = sorted(names, key=randomness, reverse=True)
    for number, name in enumerate(names):
        append(traffic, whole(name, 100 * number))
    append(traffic, [made("long", 3000 + n) for n in range(14)] + whole("long", 3050))
    assert sample(traffic, 3, config) == 1  # Only the one that never fits.
    second = traffic if traffic.uri.startswith("memory") else open_store(traffic.uri)
    with closing(second):
        samplers = [Sampler(store, config) for store in (traffic, second) if isinstance(store, TrafficStore)]
        assert sum(sampler.run_once(BASE_NS + 62 * S) for sampler in samplers) == 20
        append(traffic, whole("straggler", 4000), 40)
        assert sum(sampler.run_once(BASE_NS + 62 * S) for sampler in samplers) == 1
        kept = [name for name in names if kept_spans(traffic, name)]
        assert sorted(kept) == sorted(ordered[:4]) and all(kept_spans(traffic, name) == 3 for name in kept)
        found = {name: read_sampled(traffic.query_spans(name)) for name in ordered}
        assert {each and each.decision.threshold for each in found.values()} == {randomness(ordered[4]) + 1}
        longest = left_out(traffic.query_spans("long"))
        assert longest is not None and (longest.decision.reason, longest.spans) == (SamplingReason.TOO_LONG, 17)


def test_two_samplers_that_disagree_carry_out_the_first_decision(traffic: TrafficStore) -> None:
    """A reward that only one of them has seen changes what it proposes, and not what is done."""
    append(traffic, whole(LOW, 100))
    slow = Sampler(traffic, CONFIG)
    slow.run_once(BASE_NS)  # Reads the spans, decides nothing yet.
    append(traffic, [made(LOW, 103, semconv.SPAN_REWARD, **{semconv.REWARD_VALUE: 0.9})], 2)
    proposal = '{"agl.sampled.unit": "task-3", "agl.sampled.kept": false, "agl.sampled.reason": "base_rate", '
    stored = traffic.decide({f"rollout {LOW}": proposal + '"agl.sampled.threshold": "b3333333333330"}'})
    assert len(stored) == 1
    assert slow.run_once(BASE_NS + 3 * S) == 1
    assert kept_spans(traffic, LOW) == 0 and left_out(traffic.query_spans(LOW)) is not None


class Interleaved:
    """A store in which something happens just before a decision is stored, once, and that may list an earlier state."""

    def __init__(self, store: TrafficStore, before: Callable[[], object], listed: Pending | None = None) -> None:
        self._store, self._before, self._listed = store, [before], listed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def list_pending(self) -> Pending:
        return self._listed or self._store.list_pending()

    def decide(self, proposed: Mapping[str, str]) -> dict[str, str]:
        while self._before:
            self._before.pop()()
        return self._store.decide(proposed)


@pytest.mark.parametrize("name", [LOW, HIGH])
@pytest.mark.parametrize("case", ["the larger view first", "the smaller view first", "the smaller view is killed"])
def test_two_samplers_that_see_other_spans_count_each_once(traffic: TrafficStore, name: str, case: str) -> None:
    append(traffic, whole(name, 100, 0.2))
    early = traffic.list_pending()
    more = [made(name, 99, "chat m", **{semconv.GEN_AI_OPERATION_NAME: "chat"})]  # Its id is the smallest.
    if case == "the larger view first":
        other = Sampler(traffic, CONFIG)
        interleaved: Any = Interleaved(traffic, lambda: (append(traffic, more), other.run_once(BASE_NS + S)), early)
    else:
        append(traffic, more)
        killed: Any = Interleaved(traffic, lambda: None, early)
        if case == "the smaller view is killed":
            killed.append_rows = lambda rows: (_ for _ in ()).throw(StoreError("killed"))
        other = Sampler(killed, CONFIG)

        def run_other() -> None:
            with suppress(StoreError):
                other.run_once(BASE_NS + S)

        interleaved = Interleaved(traffic, run_other)
    Sampler(interleaved, CONFIG).run_once(BASE_NS + S)
    sampled = read_sampled(traffic.query_spans(name))
    assert sampled is not None and (sampled.spans, sampled.calls, pending(traffic)) == (5, 3, 0)
    assert (sampled.reward and sampled.reward.value, kept_spans(traffic, name)) == (0.2, 5 if name == HIGH else 0)


def test_what_is_left_of_simulated_production_tells_what_there_was(traffic: TrafficStore) -> None:
    """Two samplers that restart by turns, as in `benchmarks/sampling.py` with 20,000; memory has one store only."""
    made = sampling.production(150)
    second = traffic if traffic.uri.startswith("memory") else open_store(traffic.uri)
    with closing(second), closing(open_store("memory://")) as alone:
        assert isinstance(second, TrafficStore) and isinstance(alone, TrafficStore)
        decisions = sampling.run(made, [traffic, second], restarts=True)
        assert decisions == sampling.run(made, [alone], restarts=False)
    found = sampling.Figures.of(made, decisions)
    assert (found.undecided, found.rewarded_lost, found.groups_cut) == (0, 0, 0)
    assert 30 < found.most_spans <= 40
    assert abs(found.estimate - found.mean) < 3 * found.error
