"""The team on LangGraph, instrumented by OpenInference."""

from exporting import QUESTION, exporting, rewarded
from langgraph_team import run
from openinference.instrumentation.langchain import LangChainInstrumentor

with exporting():
    LangChainInstrumentor().instrument()
    with rewarded():
        run(QUESTION)
