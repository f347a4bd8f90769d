"""Instrumentors switched on by the name of their entry point."""

import pytest

from agl.errors import ConfigError
from agl_langchain import LangChainInstrumentor
from agl_trainer.rollout.instrumentors import instrumented


def test_an_instrumentor_is_on_in_the_block_only() -> None:
    with instrumented(["agl_langchain"]):
        assert LangChainInstrumentor().is_instrumented_by_opentelemetry
    assert not LangChainInstrumentor().is_instrumented_by_opentelemetry


def test_one_that_was_on_before_stays_on() -> None:
    LangChainInstrumentor().instrument()
    try:
        with instrumented(["agl_langchain"]):
            pass
        assert LangChainInstrumentor().is_instrumented_by_opentelemetry
    finally:
        LangChainInstrumentor().uninstrument()


def test_an_unknown_name_lists_those_installed_and_switches_nothing_on() -> None:
    with pytest.raises(ConfigError, match="no package offers 'langchian'; installed are agl_autogen, agl_langchain"):  # noqa: SIM117
        with instrumented(["agl_langchain", "langchian"]):
            pytest.fail("the block must not run")
    assert not LangChainInstrumentor().is_instrumented_by_opentelemetry
