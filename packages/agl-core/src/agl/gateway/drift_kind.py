"""Compares a call's prompt with the tokens sampled before it in the conversation, and names the kind of drift."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

import aiohttp

from agl.gateway.conversation import THOUGHT_END, AssistantMessage, Position, SampledTurn, visible_text
from agl.gateway.record import CallRecord
from agl.gateway.tokenizer import Tokenizer, TokenizerError
from agl.tokens.drift import Drift, Drifted, first_difference
from agl.tokens.packing import ID_BYTES, unpack_ids

_TEXT_S: Final = 2.0
"""Limit for a response of `/detokenize`, in seconds."""
_COMPARED_IDS: Final = 4096
"""Tokens after the first difference whose text decides the kind of drift."""


async def find_drift(
    session: aiohttp.ClientSession, record: CallRecord, position: Position, previous: SampledTurn, prompt: bytes
) -> Drifted | None:
    """How `prompt`, packed ids, differs from the tokens of `previous`; None if it starts with all of them."""
    context = previous.context()
    difference = first_difference(context, prompt)
    if difference is None:
        return None
    answer = AssistantMessage.read(position.messages[position.previous_index])
    edited = position.unchanged is not previous
    first, last = difference.position * ID_BYTES, (difference.position + _COMPARED_IDS) * ID_BYTES
    sampled, found = unpack_ids(context[first:last]), unpack_ids(prompt[first:last])
    end = sampled[-1:] if previous.ended_by_model and len(sampled) < _COMPARED_IDS else []
    try:
        texts = await _detokenize(session, record, [sampled, found, sampled[:1], found[:1], end])
    except TokenizerError:
        kind = Drift.EDITED if edited else kind_of_drift(previous.answer, answer, None)
        return Drifted(kind, difference, previous.span_id)
    difference = replace(difference, sampled_text=texts[2], prompt_text=texts[3] if found else None)
    kind = Drift.EDITED if edited else kind_of_drift(previous.answer, answer, (texts[0], texts[1], texts[4]))
    return Drifted(kind, difference, previous.span_id)


async def _detokenize(session: aiohttp.ClientSession, record: CallRecord, parts: Sequence[Sequence[int]]) -> list[str]:
    """The text of each part, from the engine that answered."""
    assert record.engine is not None
    tokenizer = Tokenizer(session, record.engine, record.headers, _TEXT_S)
    model = record.sent.get("model") or ""

    async def text(part: Sequence[int]) -> str:
        return await tokenizer.detokenize(model, part) if part else ""

    return await asyncio.gather(*map(text, parts))


def kind_of_drift(sampled: AssistantMessage, sent_back: AssistantMessage, texts: tuple[str, str, str] | None) -> Drift:
    """The kind of drift of an answer that was `sampled`, and `sent_back` with the same meaning.

    `texts` are the sampled text and the prompt's text from the first token that differs, and the text of the token
    that ended the answer (empty if none did). None: the engine reports no text, and only the messages are compared.
    """
    if texts is None:
        return _by_messages(sampled, sent_back)
    sampled_text, prompt_text, end = texts
    if _same_turn(sampled_text, prompt_text, end, str):
        return Drift.RETOKENIZED
    if THOUGHT_END in sampled_text and _same_turn(sampled_text, prompt_text, end, visible_text):
        return Drift.REASONING
    # If the name of the first tool call is still to come, the difference is before the call.
    in_call = bool(sampled.calls) and sampled.calls[0][0] not in sampled_text
    if not in_call and _same_turn(sampled_text, prompt_text, end, _without_blanks):
        return Drift.WHITESPACE
    return Drift.ARGUMENTS if sampled.calls else Drift.REWRITTEN


def _by_messages(sampled: AssistantMessage, sent_back: AssistantMessage) -> Drift:
    if sampled.has_thoughts and not sent_back.has_thoughts:
        return Drift.REASONING
    if sampled.calls != sent_back.calls:
        return Drift.ARGUMENTS
    return Drift.RETOKENIZED if sampled.text == sent_back.text else Drift.WHITESPACE


def _same_turn(sampled: str, prompt: str, end: str, normalize: Callable[[str], str]) -> bool:
    """Whether both texts start with the same turn, after `normalize`. A turn that was cut short has no `end`."""
    if end:
        return normalize(sampled.partition(end)[0]) == normalize(prompt.partition(end)[0])
    return normalize(prompt).startswith(normalize(sampled))


def _without_blanks(text: str) -> str:
    return "".join(text.split())
