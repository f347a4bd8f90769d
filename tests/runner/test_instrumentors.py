"""Switching instrumentors on by the name of their entry point."""

import pytest

from agl.errors import ConfigError
from agl.runner.instrumentors import instrumented
from agl_langchain import LangChainInstrumentor


def test_an_instrumentor_is_on_only_in_the_block() -> None:
    with instrumented(["agl_langchain"]):
        assert LangChainInstrumentor().is_instrumented_by_opentelemetry
    assert not LangChainInstrumentor().is_instrumented_by_opentelemetry


def test_an_instrumentor_that_was_on_before_stays_on() -> None:
    LangChainInstrumentor().instrument()
    try:
        with instrumented(["agl_langchain"]):
            pass
        assert LangChainInstrumentor().is_instrumented_by_opentelemetry
    finally:
        LangChainInstrumentor().uninstrument()


def test_the_error_for_an_unknown_name_lists_the_installed_ones() -> None:
    with pytest.raises(ConfigError, match="no package offers 'langchian'; installed are agl_autogen, agl_langchain"):  # noqa: SIM117
        with instrumented(["agl_langchain", "langchian"]):
            pytest.fail("the block must not run")
    assert not LangChainInstrumentor().is_instrumented_by_opentelemetry
