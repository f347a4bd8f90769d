"""The ways to run a LangChain runnable; each takes `(runnable, input, config)` and reads the output to its end."""

from collections.abc import Awaitable, Callable
from typing import Any

Mode = Callable[[Any, Any, Any], Awaitable[Any]]


async def invoke(runnable: Any, value: Any, config: Any) -> Any:
    return runnable.invoke(value, config)


async def ainvoke(runnable: Any, value: Any, config: Any) -> Any:
    return await runnable.ainvoke(value, config)


async def stream(runnable: Any, value: Any, config: Any) -> Any:
    return list(runnable.stream(value, config))


async def astream(runnable: Any, value: Any, config: Any) -> Any:
    return [item async for item in runnable.astream(value, config)]


async def batch(runnable: Any, value: Any, config: Any) -> Any:
    return runnable.batch([value], config)


async def abatch(runnable: Any, value: Any, config: Any) -> Any:
    return await runnable.abatch([value], config)


MODES: list[Mode] = [invoke, ainvoke, stream, astream, batch, abatch]
STREAMS: list[Mode] = [stream, astream]
ASYNC_MODES: list[Mode] = [ainvoke, astream, abatch]


async def events_v1(runnable: Any, value: Any, config: Any) -> Any:
    return [event async for event in runnable.astream_events(value, config, version="v1")]


async def events_v2(runnable: Any, value: Any, config: Any) -> Any:
    return [event async for event in runnable.astream_events(value, config, version="v2")]


EVERY_MODE: list[Mode] = [*MODES, events_v1, events_v2]
EVERY_ASYNC_MODE: list[Mode] = [*ASYNC_MODES, events_v1, events_v2]
