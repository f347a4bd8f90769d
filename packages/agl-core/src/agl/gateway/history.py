"""What was sampled in each conversation, found again by the messages that it answered."""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from agl.tokens.capture import Choice, Json

Key = tuple[str, str, str]
"""Rollout, attempt and model; where no rollout is named, the trace in place of the first two."""

_LIMIT_BYTES: Final = 64 * 2**20
_HELD_BYTES: Final = 500
_HISTORY_BYTES: Final = 450
"""About what a call takes beside its tokens and text, and a conversation beside its calls."""
_TEMPLATE_FIELDS: Final = ("tools", "chat_template", "chat_template_kwargs", "reasoning_effort", "documents")
"""Fields of a request that change how its messages are written."""
_THOUGHT_END: Final = "</think>"
_encode = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode


@dataclass(frozen=True, slots=True)
class Said:
    """An answer as its client was given it."""

    text: str
    reasoning: str
    calls: tuple[tuple[str, str], ...]
    """Name and arguments of each tool call."""

    @classmethod
    def by(cls, choice: Choice) -> "Said":
        return cls(choice.text, choice.reasoning, tuple((call.name, call.arguments) for call in choice.tool_calls))

    @classmethod
    def read(cls, message: Json) -> "Said":
        """The answer that an assistant's message of a request sends back. Raises ValueError where it has no form."""
        try:
            functions = [call["function"] for call in message.get("tool_calls") or ()]
            calls = tuple((str(function["name"]), str(function.get("arguments"))) for function in functions)
            reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
            return cls(_text(message.get("content")), str(reasoning), calls)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"not an assistant's message: {error}") from error

    def means(self, other: "Said") -> bool:
        """Whether both say the same, whatever became of thoughts, of blanks around them and in the form of JSON."""
        return self._meaning() == other._meaning()

    @property
    def has_thoughts(self) -> bool:
        return bool(self.reasoning) or _THOUGHT_END in self.text

    def _meaning(self) -> tuple[str, list[tuple[str, Any]]]:
        return self.text.rpartition(_THOUGHT_END)[2].strip(), [(name, _read(text)) for name, text in self.calls]


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """A call from whose answer a conversation may go on."""

    above: "Held | None"
    """The call with whose tokens its prompt starts."""
    added: bytes
    """Packed ids of its prompt and its answer, without those of `above`."""
    said: Said
    ended: bool
    """Whether the model ended its answer itself, so that its last token ends a turn."""
    span_id: str

    def context(self) -> bytes:
        """Packed ids of prompt and answer."""
        parts, held = [self.added], self.above
        while held is not None:
            parts.append(held.added)
            held = held.above
        return b"".join(reversed(parts))

    @property
    def size(self) -> int:
        text = len(self.said.text) + len(self.said.reasoning) + sum(len(name) + len(a) for name, a in self.said.calls)
        return _HELD_BYTES + len(self.added) + text


@dataclass(slots=True)
class Place:
    """Where a request stands in its conversation."""

    key: Key
    digest: bytes
    """Of all its messages."""
    messages: Sequence[Json]
    before: Held | None = None
    """The latest call that it continues by its messages, whatever it sends back for the answer."""
    index: int = 0
    """Of the message that sends that answer back."""
    exact: Held | None = None
    """The latest call that it continues, whose answer it sends back as it was given."""
    exact_index: int = 0


@dataclass(slots=True)
class _History:
    held: dict[bytes, list[Held]] = field(default_factory=dict)
    size: int = _HISTORY_BYTES


class Histories:
    """Calls by the digest of their messages. Conversations beyond `limit` bytes are forgotten, the stalest first."""

    def __init__(self, limit: int = _LIMIT_BYTES) -> None:
        self._limit = limit
        self._histories: OrderedDict[Key, _History] = OrderedDict()
        self.size = 0

    def place(self, key: Key, request: Json) -> Place | None:
        """None where the messages have no form that could be compared."""
        messages = request.get("messages")
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            return None
        history = self._histories.get(key)
        place = Place(key, b"", messages)
        for index, digest in enumerate(_digests(request, messages)):
            place.digest = digest
            is_answer = index < len(messages) and messages[index].get("role") == "assistant"
            if history is not None and is_answer and (held := history.held.get(digest)):
                _go_on(place, index, held)
        return place

    def keep(self, place: Place, held: Held) -> None:
        """Remember a call that answered the messages of `place`."""
        history = self._histories.get(place.key)
        if history is None:
            history = self._histories[place.key] = _History()
            self.size += history.size
        self._histories.move_to_end(place.key)
        history.held.setdefault(place.digest, []).append(held)
        history.size += held.size
        self.size += held.size
        while self.size > self._limit:
            _, forgotten = self._histories.popitem(last=False)
            self.size -= forgotten.size


def _go_on(place: Place, index: int, held: Sequence[Held]) -> None:
    try:
        said = Said.read(place.messages[index])
    except ValueError:
        return
    fitting = next((one for one in reversed(held) if one.said.means(said)), None)
    place.before, place.index = fitting or held[-1], index
    if fitting is not None:
        place.exact, place.exact_index = fitting, index


def _digests(request: Json, messages: Sequence[Json]) -> Iterator[bytes]:
    """Digests of no message, of the first, of the first two, and so on, each with what writes them."""
    written = hashlib.blake2b(
        _encode([request.get(name) for name in _TEMPLATE_FIELDS]).encode("utf-8", "surrogatepass"), digest_size=16
    )
    yield written.digest()
    for message in messages:
        written.update(_encode(message).encode("utf-8", "surrogatepass"))
        yield written.digest()


def _text(content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part["text"] for part in content)


def _read(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
