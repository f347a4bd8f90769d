"""Token ids, logprobs, text and tool calls captured from an OpenAI-compatible engine's response, whole or in chunks.

`Capture.add` reads a whole response or one chunk; `strip` removes the fields that the client did not request.

vLLM: `prompt_token_ids` is at the top level (chat) or in the choice (completions), `token_ids` in the choice. In a
stream the first chunk has the prompt's ids, and each chunk the ids of its tokens.
SGLang, chat: `sglext` at the top level has `input_ids`, and `output_ids` with a list for each choice. In a stream a
separate last chunk has it.
"""

from dataclasses import dataclass, field
from typing import Any, Final, Self

from agl import semconv
from agl.tokens.packing import pack_ids, pack_logprobs

Json = dict[str, Any]

_ID_FIELDS = ("prompt_token_ids", "token_ids")
SGLANG_FIELDS: Final = {"return_input_ids_in_sglext": "input_ids", "return_output_ids_in_sglext": "output_ids"}
"""SGLang's request fields, each with the field of `sglext` that it asks for."""
_ENVELOPE = frozenset({"id", "object", "created", "model", "choices", "usage"})


@dataclass(frozen=True, slots=True)
class RequestedFields:
    """What the client requested itself: the model's name, and which captured fields it wants in the response."""

    token_ids: bool
    logprobs: bool
    model: str | None = None
    sent_model: str | None = None
    """The name sent to the engine, if it differs from `model`."""
    sglext: frozenset[str] = frozenset()
    """Subset of `input_ids`, `output_ids` that the client requested."""

    @classmethod
    def read(cls, body: Json, operation: str) -> Self:
        logprobs = body.get("logprobs")
        # In /v1/completions this is the number of alternatives, and 0 requests the sampled token's own logprob.
        wants_logprobs = bool(logprobs) or (operation == semconv.OPERATION_TEXT_COMPLETION and logprobs is not None)
        model = body.get("model")
        return cls(
            bool(body.get("return_token_ids")),
            wants_logprobs,
            model if isinstance(model, str) else None,
            sglext=frozenset(field for name, field in SGLANG_FIELDS.items() if body.get(name)),
        )


@dataclass(slots=True)
class CapturedToolCall:
    """A tool call of a response; a stream delivers it in pieces."""

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
    tool_calls: list[CapturedToolCall] = field(default_factory=list)
    stop_string: str | None = None
    """The stop string at which the engine ended the answer; None if the model ended it by a token."""
    _packed_prompt_ids: bytes = b""

    def add(self, part: Json) -> None:
        """Read a choice of a whole response or of a chunk."""
        message = part.get("message") or part.get("delta") or {}
        self.prompt_ids = part.get("prompt_token_ids") or self.prompt_ids
        self.token_ids += part.get("token_ids") or ()
        self.logprobs += _logprobs(part.get("logprobs") or {})
        self.finish_reason = part.get("finish_reason") or self.finish_reason
        stop = part.get("stop_reason") or part.get("matched_stop")  # The names of vLLM and SGLang.
        self.stop_string = stop if isinstance(stop, str) else self.stop_string
        self.text += part.get("text") or message.get("content") or ""
        self.reasoning += message.get("reasoning_content") or message.get("reasoning") or ""
        for call in message.get("tool_calls") or ():
            self._tool_call(call.get("index")).add(call)

    def message(self) -> Json:
        """The answer as a GenAI output message."""
        parts: list[Json] = [{"type": "reasoning", "content": self.reasoning}] if self.reasoning else []
        parts += [{"type": "text", "content": self.text}] if self.text else []
        for call in self.tool_calls:
            parts.append({"type": "tool_call", "id": call.id, "name": call.name, "arguments": call.arguments})
        return {"role": "assistant", "parts": parts, "finish_reason": self.finish_reason}

    def packed_prompt_ids(self) -> bytes:
        """The prompt's ids, packed at the first call, which comes after the last `add`.

        Raises TypeError or OverflowError for values that are no token ids.
        """
        self._packed_prompt_ids = self._packed_prompt_ids or pack_ids(self.prompt_ids)
        return self._packed_prompt_ids

    def token_attributes(self) -> dict[str, bytes]:
        """Span attributes of the ids and logprobs that arrived, packed. Raises as `packed_prompt_ids` does."""
        found: dict[str, bytes] = {}
        if self.prompt_ids:
            found[semconv.PROMPT_TOKEN_IDS] = self.packed_prompt_ids()
        if self.token_ids:
            found[semconv.RESPONSE_TOKEN_IDS] = pack_ids(self.token_ids)
        if self.logprobs and None not in self.logprobs:
            found[semconv.RESPONSE_LOGPROBS] = pack_logprobs(self.logprobs)
        return found

    def _tool_call(self, index: int | None) -> CapturedToolCall:
        """Tool call `index`, created if it is the next. Whole responses have no index: each call is a new one."""
        if index is None or index >= len(self.tool_calls):
            self.tool_calls.append(CapturedToolCall())
            return self.tool_calls[-1]
        return self.tool_calls[index]


@dataclass(slots=True)
class Capture:
    """An engine's response to one call, as far as it has arrived."""

    response_id: str | None = None
    model: str | None = None
    usage: Json = field(default_factory=dict)
    _prompt_ids: list[int] = field(default_factory=list)
    _choices: dict[int, Choice] = field(default_factory=dict)

    def add(self, part: Json) -> None:
        """Read a whole response or the next chunk. Raises TypeError, AttributeError or KeyError on a wrong form."""
        self.response_id = part.get("id") or self.response_id
        self.model = part.get("model") or self.model
        self.usage = part.get("usage") or self.usage
        self._prompt_ids = part.get("prompt_token_ids") or self._prompt_ids
        for choice in part.get("choices") or ():
            index = choice.get("index") or 0
            self._choices.setdefault(index, Choice(index)).add(choice)
        self._add_sglext(part.get("sglext") or {})

    def _add_sglext(self, tokens: Json) -> None:
        self._prompt_ids = tokens.get("input_ids") or self._prompt_ids
        for index, ids in enumerate(tokens.get("output_ids") or ()):
            self._choices.setdefault(index, Choice(index)).token_ids = ids

    @property
    def has_tokens(self) -> bool:
        """Whether any sampled token, text or tool call has arrived."""
        return any(choice.token_ids or choice.text or choice.tool_calls for choice in self._choices.values())

    def choices(self) -> list[Choice]:
        """The choices by index, each with its prompt's ids."""
        for choice in self._choices.values():
            choice.prompt_ids = choice.prompt_ids or self._prompt_ids
        return [self._choices[index] for index in sorted(self._choices)]


def strip(response: Json, requested: RequestedFields) -> bool:
    """Remove the captured fields that the client did not request, in place. Returns whether `response` changed.

    `model` becomes the name that the client asked for: clients compare the two, and the version is on the call's span.
    """
    changed = requested.model is not None and _is_version_of(str(response.get("model")), requested)
    if changed:
        response["model"] = requested.model
    for holder in (response, *(response.get("choices") or ())):
        for name in () if requested.token_ids else _ID_FIELDS:
            changed |= holder.pop(name, None) is not None
        if not requested.logprobs and holder.get("logprobs") is not None:
            holder["logprobs"] = None
            changed = True
    return _strip_sglext(response, requested) or changed


def _strip_sglext(response: Json, requested: RequestedFields) -> bool:
    tokens = response.get("sglext")
    extra = [name for name in SGLANG_FIELDS.values() if tokens and name in tokens and name not in requested.sglext]
    if not tokens or not extra:
        return False
    for name in extra:
        del tokens[name]
    if not tokens:
        del response["sglext"]
    return True


def _is_version_of(responding: str, requested: RequestedFields) -> bool:
    """Whether the engine's model name is a version of the requested one, or of the name sent in its place."""
    if requested.sent_model is not None and responding.partition("@")[0] == requested.sent_model.partition("@")[0]:
        return True
    return responding.startswith(f"{requested.model}@")


def is_empty_chunk(chunk: Json) -> bool:
    """Whether a stripped chunk has nothing left: without the capture the engine would not have sent it.

    Chat tokens without text give such chunks (half a character, an unparsed tool call); completions send every token.
    """
    choices = chunk.get("choices")
    if not choices:
        return choices == [] and not chunk.get("usage") and chunk.keys() <= _ENVELOPE
    return not chunk.get("usage") and all(_is_empty(choice) for choice in choices)


def _is_empty(choice: Json) -> bool:
    fields = [choice.get(name) for name in ("finish_reason", "logprobs", "token_ids")]
    return "delta" in choice and not any(fields + list((choice["delta"] or {}).values()))


def _logprobs(logprobs: Json) -> list[float]:
    """Logprobs of the sampled tokens, from the form of chat or of completions."""
    content = logprobs.get("content")
    return [token["logprob"] for token in content] if content else logprobs.get("token_logprobs") or []
