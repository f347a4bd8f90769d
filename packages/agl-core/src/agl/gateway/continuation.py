"""Calls that continue a conversation: prompts made of the tokens held, and what became of these where they are not."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import aiohttp

from agl.config import GatewayConfig
from agl.gateway.call import Call
from agl.gateway.drift_kind import kind_of_drift
from agl.gateway.engine import Engine
from agl.gateway.history import Held, Histories, Place, Said
from agl.gateway.identity import Caller
from agl.gateway.template_suffix import NoSuffixError, suffix_ids, variants
from agl.gateway.tokenizer import Tokenizer, TokenizerError
from agl.span import Span
from agl.tokens.capture import Json
from agl.tokens.drift import PREFIX_EXACT, Drift, Drifted, first_difference
from agl.tokens.packing import ID_BYTES, pack_ids, unpack_ids

_NOT_HELD: Final = "no call is held whose messages these continue"
_EDITED: Final = "the answer was sent back changed"
_MEDIA: Final = "the messages hold more than text"
_LAST_GOES_ON: Final = "the request goes on with its last message"
_NOT_TAKEN: Final = "the engine takes no tokens in a chat"
_ENDED: Final = frozenset({"stop", "tool_calls"})
_PROMPT_S: Final = 10.0
"""How long a call waits for the chat template to write what is new."""
_TEXT_S: Final = 2.0
"""How long a call whose tokens drifted waits to learn their text."""
_COMPARED_IDS: Final = 4096
"""As many tokens of the history are read to say what kind of drift it is."""


class Continuations:
    """What calls go on from, for all of a gateway."""

    def __init__(self, config: GatewayConfig) -> None:
        self._exact = config.exact_prefix
        self._histories = Histories()

    def place(self, caller: Caller, model: str | None, request: Json) -> Place | None:
        """Where a chat completion stands; None where nothing says to what conversation it belongs."""
        name = (model or "").partition("@")[0]  # The tokens held are right under every version.
        if caller.rollout_id:
            return self._histories.place((caller.rollout_id, caller.attempt_id or "", name), request)
        if caller.trace_id:
            return self._histories.place(("", caller.trace_id, name), request)
        return None

    async def extend(
        self, session: aiohttp.ClientSession, call: Call, place: Place, engine: Engine
    ) -> list[int] | None:
        """The prompt of `call` made of the tokens held, for an engine like `engine`.

        None where it does not continue a call, or its chat template has to make the prompt: the call then says why.
        """
        if not self._exact or not any(message.get("role") == "assistant" for message in place.messages):
            return None
        if why := _obstacle(place, call.sent):
            call.prefix = why
            return None
        assert place.exact is not None
        tokenizer = Tokenizer(session, engine, call.trip.headers, _PROMPT_S)
        try:
            ways = variants(place.exact, place.messages, place.exact_index)
            renderings = await asyncio.gather(*(tokenizer.prompt(call.sent, messages) for messages in ways))
            suffix = suffix_ids(place.exact, renderings)
        except (NoSuffixError, TokenizerError) as error:
            call.prefix = str(error)
            return None
        call.prefix = PREFIX_EXACT
        return unpack_ids(place.exact.context()) + suffix

    async def compare(self, session: aiohttp.ClientSession, call: Call, place: Place, asked: list[int] | None) -> None:
        """Note on `call`, which is answered, whether its prompt was the one `asked` for, and how it drifted."""
        choices = call.capture.choices()
        prompt = choices[0].prompt_ids if choices else []
        if not prompt:
            return
        if asked is not None and prompt[: len(asked)] != asked:
            call.prefix = _NOT_TAKEN
        try:
            packed = pack_ids(prompt)
        except (TypeError, OverflowError):  # No ids at all, which cannot be recorded either.
            return
        if place.before is not None:
            call.drifted = await self._drifted(session, call, place, place.before, packed)

    async def _drifted(
        self, session: aiohttp.ClientSession, call: Call, place: Place, before: Held, prompt: bytes
    ) -> Drifted | None:
        context = before.context()
        difference = first_difference(context, prompt)
        if difference is None:
            return None
        said = Said.read(place.messages[place.index])
        edited = place.exact is not before
        first, last = difference.position * ID_BYTES, (difference.position + _COMPARED_IDS) * ID_BYTES
        held, there = unpack_ids(context[first:last]), unpack_ids(prompt[first:last])
        end = held[-1:] if before.ended and len(held) < _COMPARED_IDS else []
        try:
            texts = await self._texts(session, call, [held, there, held[:1], there[:1], end])
        except TokenizerError:
            kind = Drift.EDITED if edited else kind_of_drift(before.said, said, None)
            return Drifted(kind, difference, before.span_id)
        difference = replace(difference, sampled_text=texts[2], prompt_text=texts[3] if there else None)
        kind = Drift.EDITED if edited else kind_of_drift(before.said, said, (texts[0], texts[1], texts[4]))
        return Drifted(kind, difference, before.span_id)

    async def _texts(self, session: aiohttp.ClientSession, call: Call, parts: Sequence[Sequence[int]]) -> list[str]:
        engine = call.trip.engine
        assert engine is not None
        tokenizer = Tokenizer(session, engine, call.trip.headers, _TEXT_S)
        model = call.sent.get("model") or ""

        async def text(part: Sequence[int]) -> str:
            return await tokenizer.text(model, part) if part else ""

        return await asyncio.gather(*map(text, parts))

    def keep(self, call: Call, place: Place, spans: Sequence[Span]) -> None:
        """Remember the answers of a recorded call; `spans` are those of its choices."""
        if call.error_type:
            return
        for choice, span in zip(call.capture.choices(), spans, strict=False):
            if not choice.prompt_ids or not choice.token_ids:
                continue
            ended = choice.finish_reason in _ENDED and choice.stop_string is None
            context = pack_ids([*choice.prompt_ids, *choice.token_ids])
            above, added = _above(place, context)
            self._histories.keep(place, Held(above, added, Said.by(choice), ended, span.span_id))


def _obstacle(place: Place, request: Json) -> str | None:
    """Why the prompt cannot be made of tokens, as far as the request says."""
    if place.exact is None:
        return _EDITED if place.before else _NOT_HELD
    if any(_has_media(message) for message in place.messages):
        return _MEDIA
    goes_on = request.get("continue_final_message") or request.get("add_generation_prompt") is False
    return _LAST_GOES_ON if goes_on or place.messages[-1].get("role") == "assistant" else None


def _has_media(message: Json) -> bool:
    content = message.get("content")
    return isinstance(content, list) and any(
        not isinstance(part, dict) or part.get("type") != "text" for part in content
    )


def _above(place: Place, context: bytes) -> tuple[Held | None, bytes]:
    """The call that `context` starts with, and what it adds to that."""
    for held in (place.exact, place.before):
        if held is not None and context.startswith(start := held.context()):
            return held, context[len(start) :]
    return None, context
