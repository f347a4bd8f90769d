"""The tokens sampled in each conversation, found by the messages that a later request sends back."""

import hashlib
import json
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from agl import semconv
from agl.span import Span
from agl.tokens.capture import Choice, Json

Agent = tuple[str | None, str | None]
"""Role and span that made a call, as far as its headers name them."""
Key = tuple[str, ...]
"""Project, rollout, attempt and model; for a call without a rollout the project, an empty string, trace and model."""

_LIMIT_BYTES: Final = 64 * 2**20
_IDLE_S: Final = 600.0
"""A rollout rarely waits longer for a tool; the memory of those that ended is then free."""
_TURN_BYTES: Final = 500
_CONVERSATION_BYTES: Final = 450
"""Approximate memory of a turn without its tokens and text, and of a conversation without its turns."""
TEMPLATE_FIELDS: Final = ("tools", "chat_template", "chat_template_kwargs", "reasoning_effort", "documents")
"""Request fields, besides the messages, that the chat template renders."""
THOUGHT_END: Final = "</think>"
_ENDED_BY_MODEL: Final = frozenset({"stop", "tool_calls"})
_encode = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode


def visible_text(text: str) -> str:
    """`text` without thoughts, and without blanks around it."""
    return text.rpartition(THOUGHT_END)[2].strip()


@dataclass(frozen=True, slots=True)
class AssistantMessage:
    """An answer, as the client gets it or sends it back."""

    text: str
    reasoning: str
    calls: tuple[tuple[str, str], ...]
    """Name and arguments of each tool call."""
    call_ids: tuple[str, ...] = ()
    """Ids of the tool calls."""

    @classmethod
    def of_choice(cls, choice: Choice) -> "AssistantMessage":
        calls = tuple((call.name, call.arguments) for call in choice.tool_calls)
        return cls(choice.text, choice.reasoning, calls, tuple(call.id for call in choice.tool_calls))

    @classmethod
    def read(cls, message: Json) -> "AssistantMessage":
        """From an assistant message of a request. Raises ValueError for a message of the wrong form."""
        try:
            made = message.get("tool_calls") or ()
            functions = [call["function"] for call in made]
            calls = tuple((str(function["name"]), str(function.get("arguments"))) for function in functions)
            reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
            return cls(
                _text(message.get("content")), str(reasoning), calls, tuple(str(call.get("id")) for call in made)
            )
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"not an assistant's message: {error}") from error

    def means_the_same(self, other: "AssistantMessage") -> bool:
        """Whether both are equal apart from thoughts, blanks around the text, and the formatting of JSON."""
        return self._meaning() == other._meaning()

    @property
    def thoughts(self) -> str:
        return self.reasoning or self.text.rpartition(THOUGHT_END)[0]

    @property
    def has_thoughts(self) -> bool:
        return bool(self.reasoning) or THOUGHT_END in self.text

    def _meaning(self) -> tuple[str, list[tuple[str, Any]]]:
        return visible_text(self.text), [(name, _parse(arguments)) for name, arguments in self.calls]


@dataclass(frozen=True, slots=True, eq=False)
class SampledTurn:
    """A recorded answer that a conversation may continue."""

    parent: "SampledTurn | None"
    """The turn with whose tokens this turn's prompt starts."""
    added: bytes
    """Packed ids of prompt and answer, without those of `parent`."""
    answer: AssistantMessage
    ended_by_model: bool
    """Whether the model ended the answer itself; then its last token ends the turn."""
    span_id: str
    agent: "Agent" = (None, None)

    def context(self) -> bytes:
        """Packed ids of prompt and answer."""
        parts, turn = [self.added], self.parent
        while turn is not None:
            parts.append(turn.added)
            turn = turn.parent
        return b"".join(reversed(parts))

    @property
    def size(self) -> int:
        """Approximate memory in bytes."""
        answer = self.answer
        text = len(answer.text) + len(answer.reasoning) + sum(len(name) + len(args) for name, args in answer.calls)
        return _TURN_BYTES + len(self.added) + text


@dataclass(slots=True)
class Position:
    """A request's position in its conversation."""

    key: Key
    digest: bytes
    """Of all its messages."""
    messages: Sequence[Json]
    agent: Agent = (None, None)
    previous: SampledTurn | None = None
    """The latest turn whose messages this request continues, even if the client changed the answer. None also if it may
    be one of several."""
    previous_index: int = 0
    """Index of the message that sends the previous answer back."""
    unchanged: SampledTurn | None = None
    """The latest turn that this request continues with the answer unchanged in meaning."""
    unchanged_index: int = 0
    is_ambiguous: bool = False
    """Whether the last answer that it sends back may be that of several calls with different tokens."""


@dataclass(slots=True)
class _Conversation:
    turns: dict[bytes, list[SampledTurn]] = field(default_factory=dict)
    """By the digest of the messages that each answered."""
    size: int = _CONVERSATION_BYTES
    used_s: float = 0.0
    """When its last turn was kept, by the monotonic clock."""


class Conversations:
    """The turns of all conversations, up to `limit` bytes; beyond it the least recently continued one is dropped.

    One that is not continued for _IDLE_S seconds is dropped too, when another one is continued.
    """

    def __init__(self, limit: int = _LIMIT_BYTES) -> None:
        self._limit = limit
        self._conversations: OrderedDict[Key, _Conversation] = OrderedDict()
        self.size = 0

    def locate(self, key: Key, request: Json, agent: Agent = (None, None)) -> Position | None:
        """None if the request's messages are not a list of objects."""
        messages = request.get("messages")
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            return None
        conversation = self._conversations.get(key)
        position = Position(key, b"", messages, agent)
        for index, digest in enumerate(_digests(request, messages)):
            position.digest = digest
            is_answer = index < len(messages) and messages[index].get("role") == "assistant"
            if conversation is not None and is_answer and (turns := conversation.turns.get(digest)):
                _advance(position, index, turns)
        return position

    def remember(self, position: Position, choices: Sequence[Choice], spans: Sequence[Span]) -> None:
        """Keep the answers of a recorded call; `spans` are those of its `choices`."""
        for choice, span in zip(choices, spans, strict=False):
            prompt = span.attributes.get(semconv.PROMPT_TOKEN_IDS)
            response = span.attributes.get(semconv.RESPONSE_TOKEN_IDS)
            if isinstance(prompt, bytes) and isinstance(response, bytes):
                ended = choice.finish_reason in _ENDED_BY_MODEL and choice.stop_string is None
                parent, added = _without_known_start(position, prompt + response)
                answer = AssistantMessage.of_choice(choice)
                self.add(position, SampledTurn(parent, added, answer, ended, span.span_id, position.agent))

    def add(self, position: Position, turn: SampledTurn) -> None:
        """Keep a turn that answered the messages of `position`."""
        conversation = self._conversations.get(position.key)
        if conversation is None:
            conversation = self._conversations[position.key] = _Conversation()
            self.size += conversation.size
        self._conversations.move_to_end(position.key)
        conversation.turns.setdefault(position.digest, []).append(turn)
        conversation.size += turn.size
        conversation.used_s = time.monotonic()
        self.size += turn.size
        while self.size > self._limit or self._first_used_s < conversation.used_s - _IDLE_S:
            _, dropped = self._conversations.popitem(last=False)
            self.size -= dropped.size

    @property
    def _first_used_s(self) -> float:
        """When the conversation that comes first in their order was used."""
        return next((each.used_s for each in self._conversations.values()), math.inf)


def conversation_key(
    project: str, rollout_id: str | None, attempt_id: str | None, trace_id: str | None, model: str
) -> Key | None:
    """The conversation of a call; None for a call without rollout and trace."""
    name = model.partition("@")[0]  # Tokens are the same under every version of a policy.
    if rollout_id:
        return project, rollout_id, attempt_id or "", name
    return (project, "", trace_id, name) if trace_id else None


def _advance(position: Position, index: int, turns: Sequence[SampledTurn]) -> None:
    """Move `position` on to the turn of `turns` that message `index` sends back."""
    try:
        answer = AssistantMessage.read(position.messages[index])
    except ValueError:
        return
    alike = [turn for turn in turns if turn.answer.means_the_same(answer)]
    turn = _identified(alike or turns, answer, position.agent)
    position.previous, position.previous_index = turn, index
    position.is_ambiguous = turn is None
    if alike and turn is not None:
        position.unchanged, position.unchanged_index = turn, index


def _identified(turns: Sequence[SampledTurn], answer: AssistantMessage, agent: Agent) -> SampledTurn | None:
    """The one of `turns`, which answered the same messages, that `answer` comes from.

    Only what is unique to a turn decides: the ids of its tool calls, its thoughts, the role and the span of its agent.
    None if several turns with different tokens remain.
    """
    facts: tuple[Callable[[SampledTurn], bool], ...] = (
        lambda turn: bool(answer.calls) and turn.answer.call_ids == answer.call_ids,
        lambda turn: answer.has_thoughts and turn.answer.thoughts == answer.thoughts,
        lambda turn: agent[0] is not None and turn.agent[0] == agent[0],
        lambda turn: agent[1] is not None and turn.agent[1] == agent[1],
    )
    for is_fact in facts if len(turns) > 1 else ():
        turns = [turn for turn in turns if is_fact(turn)] or turns
    is_one = len(turns) == 1 or len({turn.context() for turn in turns}) == 1
    return turns[-1] if is_one else None


def _without_known_start(position: Position, context: bytes) -> tuple[SampledTurn | None, bytes]:
    """The turn that `context` starts with, and the rest of `context`."""
    for turn in (position.unchanged, position.previous):
        if turn is not None and context.startswith(start := turn.context()):
            return turn, context[len(start) :]
    return None, context


def _digests(request: Json, messages: Sequence[Json]) -> Iterator[bytes]:
    """Digests of the template fields with no message, with the first, with the first two, and so on."""
    fields = _encode([request.get(name) for name in TEMPLATE_FIELDS])
    rolling = hashlib.blake2b(fields.encode("utf-8", "surrogatepass"), digest_size=16)
    yield rolling.digest()
    for message in messages:
        rolling.update(_encode(message).encode("utf-8", "surrogatepass"))
        yield rolling.digest()


def _text(content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part["text"] for part in content)


def _parse(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
