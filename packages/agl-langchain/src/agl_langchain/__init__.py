"""Records LangChain and LangGraph runs as OpenTelemetry spans with roles, which a trainer can read."""

from agl_langchain._handler import AglCallbackHandler
from agl_langchain._instrumentor import LangChainInstrumentor
from agl_langchain._token_ids import capture_token_ids

__all__ = ["AglCallbackHandler", "LangChainInstrumentor", "capture_token_ids"]
