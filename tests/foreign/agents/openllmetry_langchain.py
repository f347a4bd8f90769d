"""The team on LangGraph, instrumented by OpenLLMetry."""

from exporting import QUESTION, exporting, rewarded
from langgraph_team import run
from opentelemetry.instrumentation.langchain import LangchainInstrumentor

with exporting():
    LangchainInstrumentor().instrument()
    with rewarded():
        run(QUESTION)
