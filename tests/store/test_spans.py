"""The store's contract: spans, in any order and sent any number of times."""

import hashlib
import math
import threading
from dataclasses import replace

import pytest

from agl import otlp, semconv
from agl.errors import AglError, InputError
from agl.span import Span, SpanEvent
from agl.store import RolloutPage, Store
from agl.store.span_row import parse, parse_json
from agl.trajectory import build_trajectory
from tests.store.spans import OTHER_TRACE, TRACE, answered, asked, make_span, numbers


def test_a_span_comes_back_as_it_was(store: Store) -> None:
    span = Span(
        trace_id=TRACE,
        span_id="b7ad6b7169203331",
        parent_id="00f067aa0ba902b7",
        name="agl.gateway.call",
        start_ns=1_795_000_000_000_000_001,
        end_ns=1_795_000_000_000_000_002,
        attributes={
            "text": "naïve \x00 \N{SNOWMAN}",
            "yes": True,
            "whole": 1,
            "real": 1.0,
            "bytes": bytes(range(256)),
            "texts": ["a", ""],
            "flags": [True, False],
            "wholes": [1, -(2**63)],
            "reals": [1.0, math.inf],
            "none": [],
        },
        status="error",
        status_message="boom",
        kind=3,
        events=(SpanEvent("exception", 5, {"exception.type": "ValueError"}),),
        resource={"service.name": "agent"},
        scope="agl.gateway",
    )
    assert store.append_spans([span]) == 1
    (found,) = store.query_spans(TRACE)
    assert found == span
    assert [type(value) for value in found.attributes.values()] == [type(v) for v in span.attributes.values()]
    reals = found.attributes["reals"]
    assert isinstance(reals, list) and [type(item) for item in reals] == [float, float]


def test_a_span_sent_twice_is_stored_once_as_it_was_first_sent(store: Store) -> None:
    assert store.append_spans([make_span(1), make_span(2)]) == 2
    assert store.append_spans([make_span(2, start_ns=99), make_span(3), make_span(3)]) == 1
    assert store.count_spans() == 3
    assert [span.start_ns for span in store.query_spans(TRACE)] == [0, 0, 0]


def test_the_same_span_id_in_another_trace_is_another_span(store: Store) -> None:
    assert store.append_spans([make_span(1), make_span(1, trace=OTHER_TRACE)]) == 2


@pytest.mark.parametrize("rollout", ["r", None])
def test_media_are_stored_once_for_each_rollout_whoever_sends_them(store: Store, rollout: str | None) -> None:
    """The plug-in and the gateway each send them, and again in the next attempt, from a different process."""
    media = {semconv.MEDIA + hashlib.sha256(data).hexdigest(): data for data in (b"x" * 4000, b"y" * 4000)}
    spans = [make_span(number, rollout=rollout) for number in (1, 2, 3)]
    if rollout:
        spans[2] = replace(spans[2], trace_id=OTHER_TRACE)
    with_media = [replace(span, attributes={**span.attributes, **media}) for span in spans]

    store.append_spans(with_media[:1])
    store.append_rows(parse(otlp.encode(with_media)).rows)
    store.append_rows(parse_json(otlp.encode_json(store.query_spans(rollout or TRACE))).rows)

    found = store.query_spans(rollout or TRACE)
    assert sorted(span.span_id for span in found if span.name != semconv.SPAN_MEDIA) == [one.span_id for one in spans]
    assert [span.attributes for span in found if span.name != semconv.SPAN_MEDIA] == [one.attributes for one in spans]
    named = {semconv.ROLLOUT_ID: rollout} if rollout else {}
    stored = sorted([span.attributes for span in found if span.name == semconv.SPAN_MEDIA], key=str)
    assert stored == sorted([named | {name: data} for name, data in media.items()], key=str)
    assert build_trajectory(found).calls == []


def test_what_is_not_named_by_its_hash_is_no_media(store: Store) -> None:
    span = replace(make_span(1), attributes={semconv.MEDIA + "0" * 64: b"x" * 4000})
    store.append_spans([span])
    assert store.query_spans(TRACE) == [span]


def test_no_spans_are_no_change(store: Store) -> None:
    assert store.append_spans([]) == 0
    assert store.count_spans() == 0


def test_query_finds_named_spans_and_the_unnamed_of_their_traces_by_start(store: Store) -> None:
    store.append_spans(
        [
            make_span(1, rollout="r1", start_ns=30),
            make_span(2, start_ns=20),  # The same trace, no rollout of its own.
            make_span(3, rollout="r2", start_ns=10),  # The same trace, another rollout.
            make_span(4, trace=OTHER_TRACE, rollout="r1", start_ns=5),  # Another trace of the rollout.
            make_span(5, trace=OTHER_TRACE, start_ns=1),
            make_span(6, trace="2" * 32, start_ns=0),  # Nothing to do with it.
        ]
    )
    assert [span.name for span in store.query_spans("r1")] == ["span 5", "span 4", "span 2", "span 1"]
    assert [span.name for span in store.query_spans("r2")] == ["span 3", "span 2"]
    assert [span.name for span in store.query_spans("2" * 32)] == ["span 6"]
    assert store.query_spans("unknown") == []


def test_spans_are_ordered_by_start_time_and_then_by_arrival(
    store: Store,
) -> None:
    starts = {1: 50, 2: 10, 3: 30, 4: 10, 5: 50, 6: 10}
    for number in (5, 3, 6):
        store.append_spans([make_span(number, rollout="r", start_ns=starts[number])])
    store.append_spans([make_span(number, rollout="r", start_ns=starts[number]) for number in (4, 1, 2)])
    assert [span.name[-1] for span in store.query_spans("r")] == ["6", "4", "2", "3", "5", "1"]


def test_a_trace_joins_the_rollout_whose_gateway_calls_returned_its_responses(store: Store) -> None:
    """The rollout id is in the gateway URL; the framework's spans have none of our attributes."""
    store.append_spans([make_span(1), asked(2, "a"), asked(3, "b"), make_span(4, trace=OTHER_TRACE)])
    store.append_spans([answered(5, "a", rollout="r1"), answered(6, "b", rollout="r1")])
    assert numbers(store.query_spans("r1")) == [1, 2, 3, 5, 6]


def test_gateway_calls_that_name_no_rollout_join_the_spans_that_requested_their_responses(store: Store) -> None:
    store.append_spans(
        [asked(1, "a", rollout="r1"), asked(2, "b", trace=OTHER_TRACE), asked(3, "c", trace=OTHER_TRACE)]
    )
    store.append_spans([answered(4, "a"), answered(5, "b"), answered(6, "c"), answered(7, "other")])
    assert numbers(store.query_spans("r1")) == [1, 4]
    assert numbers(store.query_spans(OTHER_TRACE)) == [2, 3, 5, 6]
    assert numbers(store.query_spans(f"{5:032x}")) == [2, 3, 5, 6]  # From any of its spans.


def test_spans_that_name_another_rollout_never_join_by_response_id(store: Store) -> None:
    store.append_spans([asked(1, "a", rollout="r1"), answered(2, "a", rollout="r2")])
    assert (numbers(store.query_spans("r1")), numbers(store.query_spans("r2"))) == ([1], [2])


def test_a_request_served_from_a_cache_joins_nothing(store: Store) -> None:
    """The second request got the response of the first: the gateway call joins the trace of the first only."""
    store.append_spans([asked(2, "a", start_ns=2), asked(1, "a", trace=OTHER_TRACE, start_ns=2), answered(3, "a")])
    assert numbers(store.query_spans(TRACE)) == [2, 3]
    assert numbers(store.query_spans(OTHER_TRACE)) == [1]
    store.append_spans([asked(4, "b"), answered(5, "b", trace=TRACE, parent=f"{4:016x}", rollout="r1")])
    store.append_spans([asked(6, "b", trace="3" * 32)])
    assert 6 not in numbers(store.query_spans("r1"))  # A call with a parent is in the right trace already.


@pytest.mark.parametrize("answer_first", [True, False])
def test_a_response_belongs_to_the_request_that_arrived_first_whatever_start_it_states(
    store: Store, answer_first: bool
) -> None:
    answer, own = answered(1, "a", start_ns=50), asked(2, "a", rollout="own", start_ns=49)
    for span in (answer, own) if answer_first else (own, answer):
        store.append_spans([span])
    claims = [asked(n, "a", trace=f"{n:032x}", rollout=f"claims {n}", start_ns=start) for n, start in ((3, 0), (4, 49))]
    store.append_spans([*claims, own])  # Sent again, it does not arrive later.
    assert numbers(store.query_spans("own")) == [1, 2]
    assert [numbers(store.query_spans(f"claims {n}")) for n in (3, 4)] == [[3], [4]]


def test_the_spans_of_many_rollouts_are_those_of_each_alone(store: Store) -> None:
    """Also if they share a trace, are joined by a response, have no span, or are named twice."""
    store.append_spans([make_span(1, rollout="a", start_ns=5), make_span(2), make_span(3, rollout="b", start_ns=1)])
    store.append_spans([asked(4, "answer-1", rollout="b"), answered(5, "answer-1", trace="5" * 32)])
    wanted = ["b", TRACE, "none", "a", "b", "nul\0"]
    found = store.query_spans_by_rollout(wanted)
    assert list(found) == ["b", TRACE, "none", "a", "nul\0"]
    assert found == {name: store.query_spans(name) for name in found}
    assert {name: numbers(spans) for name, spans in found.items()} == {
        "b": [2, 3, 4, 5],
        TRACE: [2],
        "none": [],
        "a": [1, 2],
        "nul\0": [],
    }
    assert store.query_spans_by_rollout([]) == {}
    many = [f"r{number}" for number in range(120)]
    assert dict(store.read_spans([*many, *wanted])) == found | {name: [] for name in many}


def test_the_last_rollout_is_that_of_the_span_that_arrived_last(store: Store) -> None:
    assert store.last_rollout_id() is None
    store.append_spans([make_span(1)])
    assert store.last_rollout_id() == TRACE
    store.append_spans([make_span(2, rollout="old", start_ns=50), make_span(3, rollout="new", start_ns=40)])
    assert store.last_rollout_id() == "new"
    store.append_spans([make_span(4, trace=OTHER_TRACE)])  # a rollout that no span names
    assert store.last_rollout_id() == OTHER_TRACE
    store.append_spans([make_span(5)])  # in the trace of both named rollouts
    assert store.last_rollout_id() == "new"
    store.append_spans([asked(6, "answer", rollout="old")])
    store.append_spans([answered(7, "answer")])  # a gateway call without a parent
    assert store.last_rollout_id() == "old"


def test_rollouts_are_those_that_spans_name_and_traces_of_which_no_span_names_one(store: Store) -> None:
    assert store.rollout_ids() == []
    store.append_spans([make_span(1, rollout="late", start_ns=50), make_span(2)])
    store.append_spans([make_span(3, trace=OTHER_TRACE)])
    store.append_spans([make_span(4, rollout="early", start_ns=40), make_span(5, rollout="late")])
    assert store.rollout_ids() == ["late", OTHER_TRACE, "early"]


def test_rollouts_are_listed_page_by_page_from_the_newest(store: Store) -> None:
    assert store.list_rollouts() == RolloutPage([], None)
    for number in range(1, 6):
        store.append_spans([make_span(number, rollout=f"r{number}"), make_span(number + 10, rollout=f"r{number}")])
    store.append_spans([make_span(20, rollout="r1"), make_span(21, trace=OTHER_TRACE)])
    first = store.list_rollouts(limit=2)
    assert first.rollout_ids == [OTHER_TRACE, "r5"] and first.cursor
    store.append_spans([make_span(30, rollout="newer"), make_span(31, rollout="r4")])
    second = store.list_rollouts(2, first.cursor)
    assert second.rollout_ids == ["r4", "r3"] and second.cursor
    assert store.list_rollouts(50, second.cursor) == RolloutPage(["r2", "r1"], None)
    assert store.list_rollouts(1).rollout_ids == ["newer"]
    for wrong in ("x", "1.2.3", "-1", "1e3", "9" * 30, "\u0663"):
        with pytest.raises(InputError, match="no cursor"):
            store.list_rollouts(2, wrong)


def test_a_value_that_otlp_cannot_encode_is_rejected_and_the_store_goes_on(store: Store) -> None:
    with pytest.raises(AglError, match="span 1"):
        store.append_spans([make_span(1), Span(TRACE, "2" * 16, None, "span 1", 0, 1, {"big": 2**70})])
    assert store.append_spans([make_span(1)]) == 1


def test_many_threads_append_at_once(store: Store) -> None:
    def append(worker: int) -> None:
        for number in range(20):
            store.append_spans([make_span(worker * 100 + number + 1)])

    threads = [threading.Thread(target=append, args=(worker,)) for worker in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.count_spans() == 160
