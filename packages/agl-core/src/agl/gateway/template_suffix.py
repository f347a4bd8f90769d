"""What the chat template writes behind an answer, in tokens, found without looking at how it wrote the answer.

The messages are rendered with answers put in the place of the real one that differ in their last word. What these
renderings have in common at their ends was written behind the answer: its end of turn, the new messages, and the start
of the next answer. The answer's own tokens are known; they need not be rendered at all.
"""

import json
from collections.abc import Sequence
from typing import Any, Final

from agl.gateway.history import Held
from agl.tokens.capture import Json
from agl.tokens.packing import ID_BYTES, unpack_ids

_WORDS: Final = ("a", "b")
_DOT: Final = "."
_THOUGHTS: Final = ("reasoning_content", "reasoning", "thinking")


class NoSuffixError(ValueError):
    """Why the tokens behind an answer cannot be told."""


def variants(held: Held, messages: Sequence[Json], index: int) -> list[list[Json]]:
    """The messages with other answers at `index`, to be rendered for `suffix_ids`. Raises NoSuffixError."""
    said = {name: value for name, value in messages[index].items() if name not in _THOUGHTS}
    if said.get("tool_calls") and not held.ended:
        raise NoSuffixError("an answer with tool calls was cut short")
    # Where the model did not end its answer, no token says where the template's own words begin. A dot then shows
    # whether the tokenizer joins the answer's last character with what follows.
    words = _WORDS if held.ended else (*_WORDS, _DOT)
    return [[*messages[:index], _ending_with(word, said), *messages[index + 1 :]] for word in words]


def suffix_ids(held: Held, renderings: Sequence[Sequence[int]]) -> list[int]:
    """The ids that follow those of `held`; `renderings` are those of `variants`. Raises NoSuffixError."""
    first, second, *others = renderings
    suffix = _common_end(first, second)
    if len(suffix) == len(first) or not suffix:
        raise NoSuffixError("the chat template does not write the answer")
    if not held.ended:
        if any(_common_end(first, other) != suffix for other in others):
            raise NoSuffixError("the answer was cut short, and the tokenizer joins its end with what follows")
        return suffix
    (end,) = unpack_ids(held.added[-ID_BYTES:])
    if end not in suffix:
        raise NoSuffixError("the chat template ends an answer otherwise than the model did")
    return suffix[suffix.index(end) + 1 :]


def _ending_with(word: str, said: Json) -> Json:
    if not (calls := said.get("tool_calls")):
        return said | {"content": word}
    function: dict[str, Any] = calls[-1]["function"] | {"arguments": json.dumps({"a": word})}
    return said | {"tool_calls": [*calls[:-1], calls[-1] | {"function": function}]}


def _common_end(one: Sequence[int], other: Sequence[int]) -> list[int]:
    length = 0
    while length < min(len(one), len(other)) and one[-1 - length] == other[-1 - length]:
        length += 1
    return list(one[len(one) - length :])
