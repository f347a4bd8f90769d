"""Drift: what became of sampled tokens when a chat template wrote the answer they made into the next prompt.

The prompt of a turn that continues a conversation starts, token for token, with the prompt and the answer before it.
Where it does not, text was made of tokens and tokens of text on the way, and something was lost.
"""

import json
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, Self

from agl.tokens.packing import ID_BYTES, unpack_ids


class Drift(StrEnum):
    """How a call hangs on the call before it in the conversation."""

    CLEAN = "clean"
    """Its prompt starts with everything so far: same row."""
    RETOKENIZED = "retokenized"
    """The history has other tokens than were sampled. Where the engine told their text, it is the same text."""
    WHITESPACE = "whitespace"
    """The history has the answer with other blanks or line breaks."""
    REASONING = "reasoning"
    """The history has the answer without what was thought before it."""
    ARGUMENTS = "arguments"
    """The history has the arguments of a tool call written otherwise."""
    REWRITTEN = "rewritten"
    """The template wrote the answer otherwise, in none of these ways."""
    EDITED = "edited"
    """The client sent back another answer than it was given."""
    FORK = "fork"
    """The history is exact but already went on otherwise, under another policy, or to another answer: a new row."""


PREFIX_EXACT: Final = "exact"
"""What a span says of a prompt that was made of the tokens held (`agl.gateway.prefix`)."""


@dataclass(frozen=True, slots=True)
class Difference:
    """The first token in which a prompt differs from what was sampled; texts are known where an engine told them."""

    position: int
    """In the prompt."""
    sampled: int
    prompt: int | None
    """None: the prompt ends there."""
    sampled_text: str | None = None
    prompt_text: str | None = None

    def __str__(self) -> str:
        there = "nothing" if self.prompt is None else _named(self.prompt, self.prompt_text)
        return f"token {self.position}: {_named(self.sampled, self.sampled_text)} was sampled, the prompt has {there}"


def first_difference(context: bytes, prompt: bytes) -> Difference | None:
    """Where `prompt` stops to follow `context`, both packed ids; None where it starts with all of it."""
    if prompt.startswith(context):
        return None
    low, high = 0, min(len(context), len(prompt)) // ID_BYTES
    while low < high:  # The longest common start, by halves: comparing bytes is comparing memory.
        middle = (low + high + 1) // 2
        if context[: middle * ID_BYTES] == prompt[: middle * ID_BYTES]:
            low = middle
        else:
            high = middle - 1
    sampled = unpack_ids(context[low * ID_BYTES : (low + 1) * ID_BYTES])
    there = unpack_ids(prompt[low * ID_BYTES : (low + 1) * ID_BYTES])
    return Difference(low, sampled[0], there[0] if there else None)


@dataclass(frozen=True, slots=True)
class Drifted:
    """What the gateway says of a call whose prompt does not start with the tokens of the call before it."""

    kind: Drift
    difference: Difference
    after: str
    """Span id of the call before it."""

    def to_json(self) -> str:
        found = self.difference
        told: dict[str, Any] = {"kind": self.kind, "after": self.after, "position": found.position}
        told["sampled"] = {"id": found.sampled, "text": found.sampled_text}
        told["prompt"] = {"id": found.prompt, "text": found.prompt_text}
        return json.dumps(told)

    @classmethod
    def of_json(cls, text: str) -> Self | None:
        """None where `text` is none of what `to_json` writes."""
        try:
            told = json.loads(text)
            sampled, prompt = told["sampled"], told["prompt"]
            difference = Difference(
                told["position"], sampled["id"], prompt["id"], sampled.get("text"), prompt.get("text")
            )
            return cls(Drift(told["kind"]), difference, told["after"])
        except (ValueError, TypeError, KeyError, AttributeError):
            return None


def _named(token: int, text: str | None) -> str:
    return str(token) if text is None else f"{token} {text!r}"
