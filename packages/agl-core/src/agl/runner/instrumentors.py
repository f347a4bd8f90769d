"""Switches OpenTelemetry instrumentors on for the time of a training, by the name of their entry point."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import entry_points
from typing import Any

from agl.errors import ConfigError

_GROUP = "opentelemetry_instrumentor"


@contextmanager
def instrumented(names: Sequence[str]) -> Iterator[None]:
    """Switch on the instrumentors `names` (`agl_langchain`, ...) in the block, and off again if they were off before.

    Raises ConfigError if no installed package provides a name, or its framework is not installed.
    """
    with ExitStack() as stack:
        for name in names:
            instrumentor = load_instrumentor(name)
            if not instrumentor.is_instrumented_by_opentelemetry:
                instrumentor.instrument(raise_exception_on_conflict=True)
                stack.callback(instrumentor.uninstrument)
        yield


def load_instrumentor(name: str) -> Any:
    """The instrumentor `name`. Raises ConfigError as `instrumented` does."""
    known = {entry.name: entry for entry in entry_points(group=_GROUP)}
    if name not in known:
        offered = ", ".join(sorted(known)) or "none"
        raise ConfigError(f"train.instrument: no package offers {name!r}; installed are {offered}")
    try:
        return known[name].load()()
    except ImportError as error:
        raise ConfigError(f"train.instrument: {name} cannot be loaded: {error}") from error
