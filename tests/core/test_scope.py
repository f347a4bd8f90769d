"""Scopes in generators: current in the body, whoever reads it and from where, and never in the reader."""

import asyncio
import gc
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager
from typing import Any

import httpx
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

import agl

FOREIGN = trace.get_tracer("some.other.instrumentation")


def here() -> tuple[str | None, str | None]:
    """The current rollout and role."""
    rollout = agl.current_rollout()
    return (rollout.rollout_id if rollout else None), agl.current_role()


def stream(name: str) -> Iterator[tuple[str | None, str | None]]:
    """Three items, two of them in a role."""
    with agl.rollout(name):
        with agl.role("writer"):
            yield here()
            yield here()
        agl.emit_reward(1.0)
        FOREIGN.start_span("a call").end()
        yield here()


async def astream(name: str) -> AsyncGenerator[tuple[str | None, str | None], None]:
    async with agl.rollout(name):
        async with agl.role("writer"):
            yield here()
            await asyncio.sleep(0)
            yield here()
        agl.emit_reward(1.0)
        FOREIGN.start_span("a call").end()
        yield here()


def items_of(name: str) -> list[tuple[str | None, str | None]]:
    return [(name, "writer"), (name, "writer"), (name, None)]


def rollouts_and_parents(spans: InMemorySpanExporter, name: str) -> list[tuple[Any, bool]]:
    """Of each span `name`: its rollout, and whether its parent is the span of that rollout."""
    finished = spans.get_finished_spans()
    ids = {_rollout(span): span.context.span_id for span in finished if span.name == "agl.rollout" and span.context}
    return [
        (_rollout(span), span.parent is not None and span.parent.span_id == ids.get(_rollout(span)))
        for span in finished
        if span.name == name
    ]


def _rollout(span: ReadableSpan) -> object:
    return (span.attributes or {}).get("agl.rollout.id")


def test_two_generators_read_in_turn_keep_apart(spans: InMemorySpanExporter) -> None:
    read: dict[str, list[Any]] = {"r1": [], "r2": []}
    streams = {name: stream(name) for name in read}
    for _ in range(4):
        for name, items in streams.items():
            read[name] += [item for item in [next(items, None)] if item]
            assert here() == (None, None)

    assert read == {name: items_of(name) for name in read}
    for name in ("agl.reward", "a call"):
        assert rollouts_and_parents(spans, name) == [("r1", True), ("r2", True)]


async def test_two_async_generators_read_in_turn_keep_apart(spans: InMemorySpanExporter) -> None:
    read: dict[str, list[Any]] = {"r1": [], "r2": []}
    streams = {name: astream(name) for name in read}
    for _ in range(4):
        for name, items in streams.items():
            read[name] += [item for item in [await anext(items, None)] if item]
            assert here() == (None, None)

    assert read == {name: items_of(name) for name in read}
    for name in ("agl.reward", "a call"):
        assert rollouts_and_parents(spans, name) == [("r1", True), ("r2", True)]


def test_a_reader_that_stops_is_outside_whether_it_closes_the_generator_or_keeps_it() -> None:
    for item in stream("r1"):
        assert item == ("r1", "writer")
        break
    assert here() == (None, None)

    kept = stream("r2")
    next(kept)
    with FOREIGN.start_as_current_span("the reader's own") as own:
        assert own.parent is None  # type: ignore[attr-defined]  # of the SDK's spans
    assert here() == (None, None)
    del kept
    gc.collect()
    assert here() == (None, None)


async def test_an_async_reader_that_stops_is_outside() -> None:
    kept = astream("r1")
    await anext(kept)
    assert here() == (None, None)
    assert await asyncio.create_task(_here()) == (None, None)
    await kept.aclose()
    assert here() == (None, None)


async def _here() -> tuple[str | None, str | None]:
    return here()


def test_each_item_may_be_read_in_another_thread(spans: InMemorySpanExporter) -> None:
    items = stream("r1")
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as two:
        read = [pool.submit(next, items).result() for pool in (one, two, one)]
        assert [pool.submit(here).result() for pool in (one, two)] == [(None, None)] * 2
    assert next(items, None) is None

    assert read == items_of("r1")
    assert rollouts_and_parents(spans, "agl.reward") == [("r1", True)]


async def _next(items: AsyncGenerator[Any, None]) -> Any:
    return await anext(items)


async def test_each_item_may_be_read_in_another_task(spans: InMemorySpanExporter) -> None:
    items = astream("r1")
    read = [await asyncio.create_task(_next(items)) for _ in range(3)]
    await items.aclose()

    assert read == items_of("r1")
    assert rollouts_and_parents(spans, "agl.reward") == [("r1", True)]


@pytest.mark.parametrize("make", [stream, astream])
async def test_a_server_streams_each_response_in_its_rollout(
    spans: InMemorySpanExporter, make: Callable[[str], Any]
) -> None:
    """Starlette, and so FastAPI, reads a sync generator in threads whose context is copied anew for each item."""

    async def text(request: Request) -> StreamingResponse:
        items = make(request.query_params["name"])
        as_text = (f"{item}\n" for item in items) if make is stream else (f"{item}\n" async for item in items)
        return StreamingResponse(as_text)

    transport = httpx.ASGITransport(Starlette(routes=[Route("/", text)]))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        names = [f"r{index}" for index in range(8)]
        answers = await asyncio.gather(*(client.get("/", params={"name": name}) for name in names))

    for name, answer in zip(names, answers, strict=True):
        assert answer.text == "".join(f"{item}\n" for item in items_of(name))
    assert sorted(rollouts_and_parents(spans, "agl.reward")) == [(name, True) for name in names]


async def test_tasks_and_threads_that_the_body_starts_are_inside() -> None:
    async def body() -> AsyncIterator[list[Any]]:
        with agl.rollout("r1"), agl.role("writer"):
            for _ in range(2):
                yield [await asyncio.create_task(_here()), await asyncio.to_thread(here), await asyncio.gather(_here())]

    assert [item async for item in body()] == [[("r1", "writer"), ("r1", "writer"), [("r1", "writer")]]] * 2


def test_joined_and_operation_in_a_generator() -> None:
    with agl.rollout("r1"):
        headers = agl.headers()

    def body() -> Iterator[Any]:
        with agl.joined(headers), agl.operation("step") as step:
            yield here(), trace.get_current_span() is step.span

    for item in body():
        assert item == (("r1", None), True)
        assert here() == (None, None)


def test_scopes_behind_an_exit_stack_and_nested_generators() -> None:
    def inner() -> Iterator[Any]:
        with agl.role("critic"):
            yield here()

    def outer() -> Iterator[Any]:
        with ExitStack() as stack:
            stack.enter_context(agl.rollout("r1"))
            for item in inner():
                yield item, here()
            yield here()

    assert list(outer()) == [(("r1", "critic"), ("r1", None)), ("r1", None)]
    assert here() == (None, None)


@contextmanager
def in_rollout() -> Iterator[None]:
    with agl.rollout("r1"):
        yield


@asynccontextmanager
async def in_async_rollout() -> AsyncIterator[None]:
    async with agl.rollout("r1"):
        yield


@pytest.fixture
def rollout_of_a_fixture() -> Iterator[None]:
    with agl.rollout("r1"):
        yield


async def test_a_generator_that_makes_a_context_manager_opens_the_scope_for_its_block() -> None:
    with in_rollout():
        assert here() == ("r1", None)
    async with in_async_rollout():
        assert here() == ("r1", None)
    assert here() == (None, None)

    def body() -> Iterator[Any]:
        with in_rollout():
            yield here()

    for item in body():
        assert (item, here()) == (("r1", None), (None, None))


def test_a_fixture_opens_the_scope_for_the_test(rollout_of_a_fixture: None) -> None:
    assert here() == ("r1", None)


def test_a_generator_that_nobody_reads_any_more_ends_its_rollout(spans: InMemorySpanExporter) -> None:
    class Reader:
        """In a cycle with its generator, whose frame holds it."""

        def __init__(self) -> None:
            self.items = self.read()
            next(self.items)

        def read(self) -> Iterator[int]:
            with agl.rollout("r1"):
                yield 1

    thread = threading.Thread(target=Reader)
    thread.start()
    thread.join()
    gc.collect()

    assert [span.name for span in spans.get_finished_spans()] == ["agl.rollout"]
