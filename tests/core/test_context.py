"""The current rollout and role: on spans, in threads and tasks, in headers, and in other processes."""

import asyncio
import contextvars
import functools
import gc
import inspect
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry import baggage, propagate, trace
from opentelemetry.context import attach, detach, get_current
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

import agl
import agl.context
from agl.context import ActiveRollout, stated_role, with_inferred_role
from agl.errors import TelemetryError
from agl.server.app_thread import AppThread
from tests.core.otlp_sink import OtlpSink, attributes

FOREIGN = trace.get_tracer("some.other.instrumentation")


def foreign_span(name: str, **own: Any) -> None:
    """Start and end a span of another instrumentation."""
    FOREIGN.start_span(name, attributes=own).end()


def attributes_of(spans: InMemorySpanExporter, name: str) -> dict[str, Any]:
    (span,) = [span for span in spans.get_finished_spans() if span.name == name]
    return dict(span.attributes or {})


def only(spans: InMemorySpanExporter, name: str) -> ReadableSpan:
    (span,) = [span for span in spans.get_finished_spans() if span.name == name]
    return span


def test_rollout_span_and_foreign_spans_carry_the_ids(spans: InMemorySpanExporter) -> None:
    with agl.rollout("r1", group_id="task-17", attempt_id="r1-a3", mode="eval") as active:
        foreign_span("inner", **{"gen_ai.operation.name": "chat"})
    ids = {"agl.rollout.id": "r1", "agl.attempt.id": "r1-a3", "agl.group.id": "task-17", "agl.mode": "eval"}
    assert active == ActiveRollout("r1", "r1-a3", "task-17", "eval")
    assert attributes_of(spans, "inner") == {"gen_ai.operation.name": "chat"} | ids
    assert attributes_of(spans, "agl.rollout") == {"gen_ai.operation.name": "invoke_workflow"} | ids
    inner, root = only(spans, "inner"), only(spans, "agl.rollout")
    assert inner.parent is not None and root.context is not None
    assert inner.parent.span_id == root.context.span_id
    assert root.status.is_unset


def test_missing_ids_are_generated(spans: InMemorySpanExporter) -> None:
    with agl.rollout() as first, agl.rollout() as second:
        pass
    assert len(first.rollout_id) == 32 and int(first.rollout_id, 16) >= 0
    assert first.rollout_id != second.rollout_id
    assert first.attempt_id == f"{first.rollout_id}-a1"
    assert (first.group_id, first.mode) == (None, "train")
    assert all("agl.group.id" not in (span.attributes or {}) for span in spans.get_finished_spans())


def test_handle_is_frozen() -> None:
    with agl.rollout("r1") as active, pytest.raises(FrozenInstanceError):
        active.rollout_id = "r2"  # type: ignore[misc]  # the point of the test


def test_a_rollout_is_a_new_trace_linked_to_the_outer_span(spans: InMemorySpanExporter) -> None:
    with FOREIGN.start_as_current_span("request") as request:
        with agl.rollout("r1"):
            pass
        assert trace.get_current_span() is request
    root = only(spans, "agl.rollout")
    assert root.parent is None and root.context is not None
    assert root.context.trace_id != request.get_span_context().trace_id
    assert [link.context.span_id for link in root.links] == [request.get_span_context().span_id]


def test_inner_rollout_replaces_all_ids_of_the_outer(spans: InMemorySpanExporter) -> None:
    with agl.rollout("outer", group_id="g", mode="eval"):
        with agl.rollout("inner"):
            foreign_span("deep")
        foreign_span("shallow")
    assert attributes_of(spans, "deep") == {
        "agl.rollout.id": "inner",
        "agl.attempt.id": "inner-a1",
        "agl.mode": "train",
    }
    assert attributes_of(spans, "shallow")["agl.rollout.id"] == "outer"
    assert attributes_of(spans, "shallow")["agl.group.id"] == "g"


def test_nested_roles(spans: InMemorySpanExporter) -> None:
    with agl.role("planner"):
        foreign_span("plan")
        with agl.role("executor") as name:
            assert (name, agl.current_role()) == ("executor", "executor")
            foreign_span("execute")
        foreign_span("plan again")
    foreign_span("after")
    assert attributes_of(spans, "plan") == {"agl.role": "planner"}
    assert attributes_of(spans, "execute") == {"agl.role": "executor"}
    assert attributes_of(spans, "plan again") == {"agl.role": "planner"}
    assert attributes_of(spans, "after") == {}
    assert agl.current_role() is None


def test_readers() -> None:
    assert agl.current_rollout() is None
    with agl.rollout("r1", group_id="g") as active:
        assert agl.current_rollout() == active
    assert agl.current_rollout() is None


def test_an_attribute_that_the_span_has_is_kept(spans: InMemorySpanExporter) -> None:
    with agl.rollout("r1"), agl.role("planner"):
        foreign_span("own", **{"agl.role": "critic", "agl.rollout.id": "other"})
    assert attributes_of(spans, "own")["agl.role"] == "critic"
    assert attributes_of(spans, "own")["agl.rollout.id"] == "other"
    assert attributes_of(spans, "own")["agl.mode"] == "train"


def test_only_our_baggage_is_copied_and_sent(spans: InMemorySpanExporter) -> None:
    token = attach(baggage.set_baggage("customer", "secret"))
    try:
        with agl.rollout("r1"):
            foreign_span("inner")
            sent = agl.headers()
    finally:
        detach(token)
    assert "customer" not in attributes_of(spans, "inner")
    assert "secret" not in sent["baggage"]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), asyncio.CancelledError(), StopIteration(1)])
def test_an_exception_marks_the_span_and_propagates(spans: InMemorySpanExporter, error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, agl.rollout("r1"), agl.role("planner"):
        raise error
    assert caught.value is error and error.__cause__ is None
    root = only(spans, "agl.rollout")
    assert root.status.status_code is trace.StatusCode.ERROR
    assert root.attributes and root.attributes["error.type"] == type(error).__name__
    (event,) = root.events
    assert event.attributes and event.attributes["exception.message"] == str(error)
    assert agl.current_rollout() is None and agl.current_role() is None


def test_an_exception_that_cannot_be_printed_propagates(spans: InMemorySpanExporter) -> None:
    class Unprintable(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no text")

    with pytest.raises(Unprintable), agl.rollout("r1"):
        raise Unprintable
    assert attributes_of(spans, "agl.rollout")["error.type"].endswith("Unprintable")


async def test_async_with(spans: InMemorySpanExporter) -> None:
    async with agl.rollout("r1") as active, agl.role("planner"):
        await asyncio.sleep(0)
        foreign_span("inner")
    assert active.rollout_id == "r1"
    assert attributes_of(spans, "inner")["agl.role"] == "planner"
    with pytest.raises(ValueError, match="no"):
        async with agl.rollout("r2"):
            raise ValueError("no")
    assert agl.current_rollout() is None


@pytest.fixture
def no_garbage() -> None:
    """Finalize clients that tests of other files left open: in an event loop, they would log that theirs is closed."""
    gc.collect()


async def test_200_concurrent_rollouts_do_not_mix_ids(
    spans: InMemorySpanExporter, no_garbage: None, caplog: pytest.LogCaptureFixture
) -> None:
    async def call(rollout_id: str, role: str) -> None:
        async with agl.role(role):
            await asyncio.sleep(0)
            with FOREIGN.start_as_current_span(f"{rollout_id}/{role}"):
                await asyncio.sleep(0)
                await asyncio.to_thread(foreign_span, f"{rollout_id}/{role}/thread")

    async def agent(number: int) -> None:
        async with agl.rollout(f"r{number}", group_id=f"g{number % 8}"):
            await asyncio.gather(call(f"r{number}", "planner"), call(f"r{number}", "executor"))

    await asyncio.gather(*(agent(number) for number in range(200)))
    inner = [span for span in spans.get_finished_spans() if span.name != "agl.rollout"]
    assert len(inner) == 200 * 2 * 2
    for span in inner:
        assert span.attributes
        rollout_id, role, *_ = span.name.split("/")
        assert span.attributes["agl.rollout.id"] == rollout_id
        assert span.attributes["agl.role"] == role
        assert span.attributes["agl.group.id"] == f"g{int(rollout_id[1:]) % 8}"
    traces = {(span.attributes or {})["agl.rollout.id"]: span.context.trace_id for span in inner if span.context}
    assert len(set(traces.values())) == 200
    assert not caplog.records


def test_threads_with_a_copied_context(spans: InMemorySpanExporter) -> None:
    with agl.rollout("r1"), ThreadPoolExecutor(2) as pool:
        pool.submit(contextvars.copy_context().run, foreign_span, "copied").result()
    bare = threading.Thread(target=foreign_span, args=("bare",))
    bare.start()
    bare.join()
    assert attributes_of(spans, "copied")["agl.rollout.id"] == "r1"
    assert attributes_of(spans, "bare") == {}


def test_headers_carry_ids_and_parent_to_another_service(spans: InMemorySpanExporter) -> None:
    with agl.rollout("r/1", group_id="täsk; a=1, b", mode="prod") as active, agl.role("planner"):
        sent = agl.headers()
        span_id = trace.get_current_span().get_span_context().span_id
    assert sorted(sent) == ["baggage", "traceparent"]
    token = attach(propagate.extract(sent))
    try:
        assert agl.current_rollout() == active
        assert agl.current_role() == "planner"
        foreign_span("remote")
    finally:
        detach(token)
    remote = only(spans, "remote")
    assert remote.parent is not None and remote.parent.span_id == span_id
    assert attributes_of(spans, "remote")["agl.group.id"] == "täsk; a=1, b"


async def rollout_later() -> object:
    await asyncio.sleep(0)
    return agl.current_rollout()


def two_rollouts() -> Iterator[object]:
    yield agl.current_rollout()
    yield agl.current_rollout()


async def two_rollouts_later() -> AsyncIterator[object]:
    yield agl.current_rollout()
    yield agl.current_rollout()


async def listed(items: AsyncIterator[object]) -> list[object]:
    return [item async for item in items]


@pytest.mark.parametrize(
    ("function", "run", "times"),
    [
        (rollout_later, lambda carried: [asyncio.run(carried())], 1),
        (functools.partial(rollout_later), lambda carried: [asyncio.run(carried())], 1),
        (lambda: rollout_later(), lambda carried: [asyncio.run(carried())], 1),
        (two_rollouts, lambda carried: list(carried()), 2),
        (two_rollouts_later, lambda carried: asyncio.run(listed(carried())), 2),
    ],
)
def test_work_that_a_carried_function_only_begins_runs_in_the_rollout(
    function: Callable[[], Any], run: Callable[[Any], list[Any]], times: int
) -> None:
    with agl.rollout("r1") as active:
        carried = agl.carry(function)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(run, carried).result() == [active] * times
        assert pool.submit(agl.current_rollout).result() is None


def test_frameworks_see_that_a_carried_function_is_asynchronous() -> None:
    assert inspect.iscoroutinefunction(agl.carry(rollout_later).__call__)
    assert not inspect.iscoroutinefunction(agl.carry(two_rollouts).__call__)
    assert pickle.loads(pickle.dumps(agl.carry(rollout_later))).function is rollout_later


def test_a_reader_between_the_items_of_a_carried_generator_is_outside() -> None:
    with agl.rollout("r1") as active:
        carried = agl.carry(two_rollouts)
    for item in carried():
        assert (item, agl.current_rollout()) == (active, None)


def test_carry_takes_the_rollout_to_a_thread(spans: InMemorySpanExporter) -> None:
    with ThreadPoolExecutor(2) as pool:
        for name in ("r1", "r2"):
            with agl.rollout(name), agl.role("planner"):
                work = agl.carry(foreign_span)
            pool.submit(work, name).result()
        pool.submit(foreign_span, "after").result()
    assert [attributes_of(spans, name)["agl.rollout.id"] for name in ("r1", "r2")] == ["r1", "r2"]
    assert attributes_of(spans, "r2")["agl.role"] == "planner"
    assert attributes_of(spans, "after") == {}


POOLS = Path(__file__).with_name("pools.py")


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("executor", "fork"),
        ("executor", "spawn"),
        ("executor", "forkserver"),
        ("pool", "fork"),
        ("pool", "spawn"),
        ("process", "fork"),
        ("process", "spawn"),
        ("bare", "fork"),
        ("program", "spawn"),
    ],
)
def test_other_processes(sink: OtlpSink, kind: str, method: str) -> None:
    """However they are started and ended, their spans arrive in the rollout, as children of its span."""
    command = [sys.executable, str(POOLS), kind, method, sink.url]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert sink.services == {"pools"}
    started = [span for span in sink.spans if span.name == "agl.message"]
    assert len(started) == (kind == "bare")
    roots = {attributes(span)["agl.rollout.id"].string_value: span for span in sink.spans if span.name == "agl.rollout"}
    assert sorted(roots) == ["r1", "r2", "r3"]
    assert len(sink.spans) == 3 * 3 + len(started)
    if started:  # a forked process inherits its parent's connection and must not use it
        assert sink.connections["agl.message"].isdisjoint(sink.connections["r1"])
    for name, root in roots.items():
        inside = [span for span in sink.spans if span.parent_span_id == root.span_id]
        assert {span.name for span in inside} == {name, "agl.reward"}
        for span in inside:
            said = attributes(span)
            assert (said["agl.rollout.id"].string_value, said["agl.role"].string_value) == (name, "planner")
            assert span.trace_id == root.trace_id
            if span.name == "agl.reward":
                assert (said["agl.reward.value"].double_value, said["judge"].string_value) == (0.75, "***")


@pytest.mark.parametrize("path", ["/ours", "/plain"])
def test_a_service_with_our_headers_continues_the_rollout(spans: InMemorySpanExporter, path: str) -> None:
    async def ours(request: Request) -> Response:
        async with agl.joined(request.headers) as active:
            await asyncio.to_thread(foreign_span, "served")
            return Response(active.rollout_id if active else "")

    async def plain(request: Request) -> Response:
        """A service that is instrumented by OpenTelemetry only."""
        token = attach(propagate.extract(request.headers))
        try:
            foreign_span("served")
            return Response(agl.context.carried_attributes()["agl.rollout.id"])
        finally:
            detach(token)

    service = AppThread()
    url = service.add(Starlette(routes=[Route("/ours", ours), Route("/plain", plain)]))
    with service, agl.rollout("r1", group_id="g"), agl.role("planner"):
        assert httpx.get(url + path, headers=agl.headers()).text == "r1"
        assert path == "/plain" or httpx.get(url + path).text == ""
    root, served = only(spans, "agl.rollout"), spans.get_finished_spans()[0]
    assert served.parent is not None and root.context is not None and served.context is not None
    assert (served.parent.span_id, served.context.trace_id) == (root.context.span_id, root.context.trace_id)
    assert {"agl.rollout.id": "r1", "agl.group.id": "g", "agl.role": "planner"}.items() <= (
        served.attributes or {}
    ).items()


def test_joined_replaces_the_outer_rollout_and_trace(spans: InMemorySpanExporter) -> None:
    with agl.rollout("r1", group_id="g"), agl.role("planner"):
        carried = agl.environment()
    assert sorted(carried) == ["BAGGAGE", "TRACEPARENT"]
    with agl.rollout("outer", group_id="other"), agl.role("critic"):
        with agl.joined(carried) as active:
            assert (active, agl.current_role()) == (ActiveRollout("r1", "r1-a1", "g", "train"), "planner")
        with agl.joined({}) as nothing:
            assert (nothing, agl.current_rollout(), agl.current_role()) == (None, None, None)
            foreign_span("alone")
        assert agl.current_role() == "critic"
    assert only(spans, "alone").parent is None


def test_an_inferred_role_stays_inferred_in_a_service(spans: InMemorySpanExporter) -> None:
    """There, too, the names of nested agents override it."""
    token = attach(with_inferred_role("executor", get_current()))
    try:
        carried = agl.headers()
        with agl.role("stated"):
            assert (agl.current_role(), stated_role()) == ("stated", "stated")
    finally:
        detach(token)
    assert carried == {"baggage": "agl.role=executor,agl.role.inferred=true"}
    with agl.joined(carried):
        assert (agl.current_role(), stated_role()) == ("executor", None)
        foreign_span("served")
    assert attributes_of(spans, "served") == {"agl.role": "executor"}


def test_headers_without_span_and_rollout_are_empty() -> None:
    assert agl.headers() == {}


def test_baggage_with_only_a_rollout_id() -> None:
    token = attach(baggage.set_baggage("agl.rollout.id", "r1"))
    try:
        assert agl.current_rollout() == ActiveRollout("r1", "r1-a1", None, "train")
    finally:
        detach(token)


def test_invalid_arguments_are_refused_at_the_call() -> None:
    with pytest.raises(TelemetryError, match="mode is 'training', expected one of train, eval, prod"):
        agl.rollout(mode="training")  # type: ignore[arg-type]  # the point of the test
    with pytest.raises(TelemetryError, match="rollout_id is '', expected a non-empty string"):
        agl.rollout("")
    with pytest.raises(TelemetryError, match="group_id is 17"):
        agl.rollout(group_id=17)  # type: ignore[arg-type]  # the point of the test
    with pytest.raises(TelemetryError, match="role is ' '"):
        agl.role(" ")
