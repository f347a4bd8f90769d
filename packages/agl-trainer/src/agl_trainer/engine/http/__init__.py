"""The OpenAI API in front of the in-process engine."""
