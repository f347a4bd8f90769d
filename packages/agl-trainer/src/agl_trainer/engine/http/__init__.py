"""The OpenAI-compatible HTTP API of the in-process engine."""
