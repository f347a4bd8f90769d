"""LangChain and LangGraph runs as OpenTelemetry spans with roles, ready to train."""

from agl_langchain._handler import AglCallbackHandler
from agl_langchain._instrumentor import LangChainInstrumentor

__all__ = ["AglCallbackHandler", "LangChainInstrumentor"]
