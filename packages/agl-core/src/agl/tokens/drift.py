"""Drift: the next prompt has different tokens than were sampled, because the chat template rewrote the answer's text.

The prompt of a turn that continues a conversation should start, token for token, with the previous prompt and answer.
An agent sends back text, and the template tokenizes it again, so the tokens may differ.
"""

import json
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, Self

from agl.tokens.packing import ID_BYTES, unpack_ids


class Drift(StrEnum):
    """How a call's prompt relates to the tokens of the previous call in the conversation."""

    CLEAN = "clean"
    """The prompt starts with all previous tokens: both calls share a row."""
    RETOKENIZED = "retokenized"
    """The prompt has different tokens for the same text, or the engine did not report the text."""
    WHITESPACE = "whitespace"
    """The prompt has the answer with different blanks or line breaks."""
    REASONING = "reasoning"
    """The prompt has the answer without its thoughts."""
    ARGUMENTS = "arguments"
    """The prompt has the arguments of a tool call in a different form."""
    REWRITTEN = "rewritten"
    """The template changed the answer in none of these ways."""
    EDITED = "edited"
    """The client sent back a different answer than it got."""
    FORK = "fork"
    """The prompt is exact, but the tokens were already continued differently, by a different policy, or to a
    different answer: a new row."""


PREFIX_EXACT: Final = "exact"
"""Value of the span attribute `agl.gateway.prefix` for a prompt built from sampled tokens."""


@dataclass(frozen=True, slots=True)
class Difference:
    """The first token in which a prompt differs from the sampled tokens; texts if the engine reported them."""

    position: int
    """Index in the prompt."""
    sampled: int
    prompt: int | None
    """None: the prompt ends before this position."""
    sampled_text: str | None = None
    prompt_text: str | None = None

    def __str__(self) -> str:
        found = "nothing" if self.prompt is None else _with_text(self.prompt, self.prompt_text)
        sampled = _with_text(self.sampled, self.sampled_text)
        return f"token {self.position}: {sampled} was sampled, the prompt has {found}"


def first_difference(context: bytes, prompt: bytes) -> Difference | None:
    """The first token in which `prompt` differs from `context`, both packed ids; None if it starts with all of it."""
    if prompt.startswith(context):
        return None
    low, high = 0, min(len(context), len(prompt)) // ID_BYTES
    while low < high:  # Binary search for the longest common start: slices of bytes compare as fast as memory.
        middle = (low + high + 1) // 2
        if context[: middle * ID_BYTES] == prompt[: middle * ID_BYTES]:
            low = middle
        else:
            high = middle - 1
    sampled = unpack_ids(context[low * ID_BYTES : (low + 1) * ID_BYTES])
    found = unpack_ids(prompt[low * ID_BYTES : (low + 1) * ID_BYTES])
    return Difference(low, sampled[0], found[0] if found else None)


@dataclass(frozen=True, slots=True)
class Drifted:
    """The span attribute `agl.gateway.drift`: how a prompt differs from the tokens of the previous call."""

    kind: Drift
    difference: Difference
    after: str
    """Span id of the previous call."""

    def to_json(self) -> str:
        difference = self.difference
        data: dict[str, Any] = {"kind": self.kind, "after": self.after, "position": difference.position}
        data["sampled"] = {"id": difference.sampled, "text": difference.sampled_text}
        data["prompt"] = {"id": difference.prompt, "text": difference.prompt_text}
        return json.dumps(data)

    @classmethod
    def of_json(cls, text: str) -> Self | None:
        """None if `text` does not have the form that `to_json` writes."""
        try:
            data = json.loads(text)
            sampled, prompt = data["sampled"], data["prompt"]
            texts = sampled.get("text"), prompt.get("text")
            difference = Difference(data["position"], sampled["id"], prompt["id"], *texts)
            return cls(Drift(data["kind"]), difference, data["after"])
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None


def _with_text(token: int, text: str | None) -> str:
    return str(token) if text is None else f"{token} {text!r}"
