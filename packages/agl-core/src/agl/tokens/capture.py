"""What is captured of an answer of an OpenAI-compatible engine, whole or in stream chunks, and what its client sees.

Token ids stand where vLLM puts them: `prompt_token_ids` at the top level (chat) or in the choice (completions),
`token_ids` in the choice; in a stream the prompt's on the first chunk, the answer's on every chunk. Or where SGLang
puts those of a chat: `sglext` at the top level, with `input_ids` and for each choice `output_ids`; in a stream on a
chunk of their own behind all others.
"""

from dataclasses import dataclass, field
from typing import Any, Final, Self

from agl import semconv
from agl.tokens.packing import pack_ids, pack_logprobs

Json = dict[str, Any]

_ID_FIELDS = ("prompt_token_ids", "token_ids")
SGLANG_FIELDS: Final = {
    "return_input_ids_in_sglext": "input_ids",
    "return_output_ids_in_sglext": "output_ids",
}
"""What a request asks SGLang for, and where in `sglext` it stands."""
_ENVELOPE = frozenset({"id", "object", "created", "model", "choices", "usage"})


@dataclass(frozen=True, slots=True)
class RequestedFields:
    """What the client asked for itself: the model's name, and which of the captured fields it wants to see."""

    token_ids: bool
    logprobs: bool
    model: str | None = None
    sent_model: str | None = None
    """The name by which the engine was asked, where that is another."""
    sglext: frozenset[str] = frozenset()
    """Fields of `sglext`."""

    @classmethod
    def read(cls, body: Json, operation: str) -> Self:
        logprobs = body.get("logprobs")
        # In /v1/completions it is a number of alternatives, and 0 asks for the sampled token's own.
        wants_logprobs = bool(logprobs) or (operation == semconv.OPERATION_TEXT_COMPLETION and logprobs is not None)
        model = body.get("model")
        return cls(
            bool(body.get("return_token_ids")),
            wants_logprobs,
            model if isinstance(model, str) else None,
            sglext=frozenset(field for name, field in SGLANG_FIELDS.items() if body.get(name)),
        )


@dataclass(slots=True)
class ToolCall:
    """A tool call of an answer; in a stream its parts arrive piece by piece."""

    id: str = ""
    name: str = ""
    arguments: str = ""

    def add(self, part: Json) -> None:
        function = part.get("function") or {}
        self.id = part.get("id") or self.id
        self.name += function.get("name") or ""
        self.arguments += function.get("arguments") or ""


@dataclass(slots=True)
class Choice:
    """One sampled answer, as far as it has arrived."""

    index: int
    prompt_ids: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    text: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    stop_string: str | None = None
    """The stop string at which the engine ended the answer; None where the model did, by a token."""

    def add(self, part: Json) -> None:
        """Take in a choice of a whole answer or of a chunk."""
        message = part.get("message") or part.get("delta") or {}
        self.prompt_ids = part.get("prompt_token_ids") or self.prompt_ids
        self.token_ids += part.get("token_ids") or ()
        self.logprobs += _logprobs(part.get("logprobs") or {})
        self.finish_reason = part.get("finish_reason") or self.finish_reason
        stop = part.get("stop_reason") or part.get("matched_stop")  # vLLM's and SGLang's names for it
        self.stop_string = stop if isinstance(stop, str) else self.stop_string
        self.text += part.get("text") or message.get("content") or ""
        self.reasoning += message.get("reasoning_content") or message.get("reasoning") or ""
        for call in message.get("tool_calls") or ():
            self._tool_call(call.get("index")).add(call)

    def message(self) -> Json:
        """The answer as a GenAI output message."""
        parts: list[Json] = [{"type": "reasoning", "content": self.reasoning}] if self.reasoning else []
        parts += [{"type": "text", "content": self.text}] if self.text else []
        parts += [
            {"type": "tool_call", "id": call.id, "name": call.name, "arguments": call.arguments}
            for call in self.tool_calls
        ]
        return {"role": "assistant", "parts": parts, "finish_reason": self.finish_reason}

    def token_attributes(self) -> dict[str, bytes]:
        """Span attributes of the tokens, packed, as far as they were seen."""
        found: dict[str, bytes] = {}
        if self.prompt_ids:
            found[semconv.PROMPT_TOKEN_IDS] = pack_ids(self.prompt_ids)
        if self.token_ids:
            found[semconv.RESPONSE_TOKEN_IDS] = pack_ids(self.token_ids)
        if self.logprobs and None not in self.logprobs:
            found[semconv.RESPONSE_LOGPROBS] = pack_logprobs(self.logprobs)
        return found

    def _tool_call(self, index: int | None) -> ToolCall:
        """Tool call `index`, new if it is the next; whole answers name no index, every call there is new."""
        if index is None or index >= len(self.tool_calls):
            self.tool_calls.append(ToolCall())
            return self.tool_calls[-1]
        return self.tool_calls[index]


@dataclass(slots=True)
class Capture:
    """What an engine answered to one call, as far as it has arrived."""

    response_id: str | None = None
    model: str | None = None
    usage: Json = field(default_factory=dict)
    _prompt_ids: list[int] = field(default_factory=list)
    _choices: dict[int, Choice] = field(default_factory=dict)

    def add(self, answer: Json) -> None:
        """Take in a whole answer or the next chunk."""
        self.response_id = answer.get("id") or self.response_id
        self.model = answer.get("model") or self.model
        self.usage = answer.get("usage") or self.usage
        self._prompt_ids = answer.get("prompt_token_ids") or self._prompt_ids
        for part in answer.get("choices") or ():
            index = part.get("index") or 0
            self._choices.setdefault(index, Choice(index)).add(part)
        self._add_sglext(answer.get("sglext") or {})

    def _add_sglext(self, tokens: Json) -> None:
        self._prompt_ids = tokens.get("input_ids") or self._prompt_ids
        for index, ids in enumerate(tokens.get("output_ids") or ()):
            self._choices.setdefault(index, Choice(index)).token_ids = ids

    @property
    def has_tokens(self) -> bool:
        """Whether anything sampled has arrived."""
        return any(choice.token_ids or choice.text or choice.tool_calls for choice in self._choices.values())

    def choices(self) -> list[Choice]:
        """The choices by index, each with its prompt's ids."""
        for choice in self._choices.values():
            choice.prompt_ids = choice.prompt_ids or self._prompt_ids
        return [self._choices[index] for index in sorted(self._choices)]


def strip(answer: Json, asked: RequestedFields) -> bool:
    """Make of a whole answer or a chunk, in place, what the client asked for. True: it has changed."""
    # Clients compare the name with the one they asked for; which version of it answered is the gateway's to keep.
    changed = asked.model is not None and _is_version_of(str(answer.get("model")), asked)
    if changed:
        answer["model"] = asked.model
    for holder in (answer, *(answer.get("choices") or ())):
        for name in () if asked.token_ids else _ID_FIELDS:
            changed |= holder.pop(name, None) is not None
        if not asked.logprobs and holder.get("logprobs") is not None:
            holder["logprobs"] = None
            changed = True
    return _strip_sglext(answer, asked) or changed


def _strip_sglext(answer: Json, asked: RequestedFields) -> bool:
    tokens = answer.get("sglext")
    unasked = [name for name in SGLANG_FIELDS.values() if tokens and name in tokens and name not in asked.sglext]
    if not tokens or not unasked:
        return False
    for name in unasked:
        del tokens[name]
    if not tokens:
        del answer["sglext"]
    return True


def _is_version_of(answered: str, asked: RequestedFields) -> bool:
    """Whether a name other than the one asked for is that of its version."""
    if asked.sent_model is not None and answered.partition("@")[0] == asked.sent_model.partition("@")[0]:
        return True
    return answered.startswith(f"{asked.model}@")


def is_empty_chunk(chunk: Json) -> bool:
    """Whether a stripped chunk only carried what was taken out of it: an engine would not send it by itself.

    So it is with chat tokens that have no text yet (half a character, a tool call being read); completions send every
    token.
    """
    choices = chunk.get("choices")
    if not choices:
        return choices == [] and not chunk.get("usage") and chunk.keys() <= _ENVELOPE
    return not chunk.get("usage") and all(_is_silent(choice) for choice in choices)


def _is_silent(choice: Json) -> bool:
    said = [choice.get(name) for name in ("finish_reason", "logprobs", "token_ids")]
    return "delta" in choice and not any(said + list((choice["delta"] or {}).values()))


def _logprobs(logprobs: Json) -> list[float]:
    """Logprobs of the sampled tokens, from the form of chat or of completions."""
    content = logprobs.get("content")
    return [token["logprob"] for token in content] if content else logprobs.get("token_logprobs") or []
