"""The task of the measured agents: look up four facts with a tool, one at a time, then answer."""

TOOL_CALLS = 4
PROMPT = "You look up one fact at a time, and answer when you have all four. " * 6
QUESTION = "Find the four facts, then answer."
FACT = "a fact that was looked up " * 8
"""Result of each tool call."""
ANSWER = "The four facts agree and so the answer is forty two ; there is nothing else to do ."
"""Streamed word by word."""
