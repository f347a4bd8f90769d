"""Records AutoGen teams as OpenTelemetry spans with roles: runs, turns, model calls, tools and hand-offs."""

from agl_autogen._instrumentor import AutoGenInstrumentor

__all__ = ["AutoGenInstrumentor"]
