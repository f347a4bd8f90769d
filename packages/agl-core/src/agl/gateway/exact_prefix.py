"""Prompts built from the sampled token ids of a conversation (`gateway.exact_prefix`).

The ids up to the last answer are known. The ids after it (end of turn, new messages, start of the next answer) come
from the chat template: it renders the messages twice, with placeholder answers that differ in their last word. The
longest common end of the two renderings, after the token that ends the answer, is the template's part.
"""

import asyncio
import json
from collections.abc import Sequence
from typing import Any, Final

import aiohttp

from agl.gateway.conversation import Position, SampledTurn
from agl.gateway.record import CallRecord
from agl.gateway.tokenizer import Tokenizer, TokenizerError
from agl.tokens.capture import Json
from agl.tokens.drift import PREFIX_EXACT
from agl.tokens.packing import ID_BYTES, pack_ids, unpack_ids

_UNKNOWN: Final = "no recorded call has the messages that these continue"
_SEVERAL: Final = "several calls gave the answer that these messages continue"
_EDITED: Final = "the client changed the answer"
_MEDIA: Final = "the messages contain more than text"
_CONTINUES_LAST: Final = "the request continues its last message"
_TEMPLATE_S: Final = 10.0
"""Limit for a response of `/tokenize`, in seconds."""
_WORDS: Final = ("a", "b")
_DOT: Final = "."
_THOUGHTS: Final = ("reasoning_content", "reasoning", "thinking")


class NoSuffixError(ValueError):
    """The template's tokens after an answer cannot be determined; the message has the reason."""


async def exact_prompt(session: aiohttp.ClientSession, record: CallRecord) -> bytes | None:
    """Packed ids of the call's prompt, built from sampled tokens; `record.engine` renders the rest.

    None if the call continues no other or the template must render the whole prompt; then `record.prefix` says why.
    """
    position, engine = record.position, record.engine
    if position is None or not any(message.get("role") == "assistant" for message in position.messages):
        return None
    turn = position.unchanged
    if turn is None or engine is None:
        record.prefix = _SEVERAL if position.is_ambiguous else _EDITED if position.previous else _UNKNOWN
        return None
    if reason := _obstacle(position, record.sent):
        record.prefix = reason
        return None
    tokenizer = Tokenizer(session, engine, record.headers, _TEMPLATE_S)
    try:
        variants = with_placeholders(turn, position.messages, position.unchanged_index)
        renderings = await asyncio.gather(*(tokenizer.tokenize(record.sent, messages) for messages in variants))
        suffix = suffix_ids(turn, renderings)
    except (NoSuffixError, TokenizerError) as error:
        record.prefix = str(error)
        return None
    record.prefix = PREFIX_EXACT
    return turn.context() + pack_ids(suffix)


def with_placeholders(turn: SampledTurn, messages: Sequence[Json], index: int) -> list[list[Json]]:
    """The messages with placeholder answers at `index`, to be rendered for `suffix_ids`. Raises NoSuffixError."""
    answer = {name: value for name, value in messages[index].items() if name not in _THOUGHTS}
    if answer.get("tool_calls") and not turn.ended_by_model:
        raise NoSuffixError("an answer with tool calls was cut short")
    # If the model did not end its answer, no token marks the start of the template's own text. A dot then shows
    # whether the tokenizer merges the answer's last character with the text after it.
    words = _WORDS if turn.ended_by_model else (*_WORDS, _DOT)
    return [[*messages[:index], _ending_with(word, answer), *messages[index + 1 :]] for word in words]


def suffix_ids(turn: SampledTurn, renderings: Sequence[Sequence[int]]) -> list[int]:
    """The template's ids after those of `turn`, from the renderings of `with_placeholders`. Raises NoSuffixError."""
    first, second, *others = renderings
    suffix = _common_end(first, second)
    if len(suffix) == len(first) or not suffix:
        raise NoSuffixError("the chat template does not render the answer")
    if not turn.ended_by_model:
        if any(_common_end(first, other) != suffix for other in others):
            raise NoSuffixError("the answer was cut short, and the tokenizer merges its end with the text after it")
        return suffix
    (end,) = unpack_ids(turn.added[-ID_BYTES:])
    if end not in suffix:
        raise NoSuffixError("the chat template ends an answer with a different token than the model did")
    return suffix[suffix.index(end) + 1 :]


def _obstacle(position: Position, request: Json) -> str | None:
    """The reason, as far as the request shows it, for which the prompt cannot be built from tokens."""
    if any(_has_media(message) for message in position.messages):
        return _MEDIA
    continues = request.get("continue_final_message") or request.get("add_generation_prompt") is False
    return _CONTINUES_LAST if continues or position.messages[-1].get("role") == "assistant" else None


def _has_media(message: Json) -> bool:
    content = message.get("content")
    parts = content if isinstance(content, list) else ()
    return any(not isinstance(part, dict) or part.get("type") != "text" for part in parts)


def _ending_with(word: str, answer: Json) -> Json:
    if not (calls := answer.get("tool_calls")):
        return answer | {"content": word}
    function: dict[str, Any] = calls[-1]["function"] | {"arguments": json.dumps({"a": word})}
    return answer | {"tool_calls": [*calls[:-1], calls[-1] | {"function": function}]}


def _common_end(one: Sequence[int], other: Sequence[int]) -> list[int]:
    length = 0
    while length < min(len(one), len(other)) and one[-1 - length] == other[-1 - length]:
        length += 1
    return list(one[len(one) - length :])
