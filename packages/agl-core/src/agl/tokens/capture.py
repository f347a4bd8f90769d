"""Token ids, logprobs, text and tool calls captured from an OpenAI-compatible engine's response, whole or in chunks.

`Capture.add_whole` reads a whole response, `Capture.add` one chunk; `strip` removes the fields that the client did not
request. What a response leaves open is not guessed: a choice whose tokens may be mixed up with those of another has a
`fault`, and `Capture.end` tells a whole answer from one that broke off.

vLLM: `prompt_token_ids` is at the top level (chat) or in the choice (completions), `token_ids` in the choice. In a
stream the first chunk has the prompt's ids, and each chunk the ids of its tokens.
SGLang, chat: `sglext` at the top level has `input_ids`, and `output_ids` with a list for each choice. In a stream a
separate last chunk has it.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Self

from agl import semconv
from agl.tokens.packing import pack_ids, pack_logprobs

Json = dict[str, Any]

_ID_FIELDS = ("prompt_token_ids", "token_ids")
SGLANG_FIELDS: Final = {"return_input_ids_in_sglext": "input_ids", "return_output_ids_in_sglext": "output_ids"}
"""SGLang's request fields, each with the field of `sglext` that it asks for."""
COMPLETE: Final = ("stop", "length", "tool_calls", "function_call", "content_filter")
"""The finish reasons of OpenAI's API: the answer is whole. With any other an engine reports that it broke off."""
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
    pieces: list[str] = field(default_factory=list)
    """Of the arguments. They are joined when they are read: each addition to a text copies the text."""
    index: int | None = None
    """Its place in the answer as the engine's chunks state it; two calls may have the same, or none."""

    @property
    def arguments(self) -> str:
        return "".join(self.pieces)

    @property
    def is_complete(self) -> bool:
        """Whether the arguments that have arrived are valid JSON."""
        return bool(self.pieces) and self.pieces[-1].rstrip().endswith("}") and _is_json(self.arguments)

    def add(self, part: Json) -> None:
        function = _called(part)
        self.id = _text(part.get("id")) or self.id
        self.name = _text(function.get("name")) or self.name
        arguments = function.get("arguments") or function.get("input")
        if isinstance(arguments, dict):  # TGI, llama.cpp
            arguments = json.dumps(arguments)
        if text := _text(arguments):
            self.pieces.append(text)

    def is_continued_by(self, part: Json) -> bool:
        """Whether the delta `part`, which has this call's index, belongs to it. A new id or name starts a call."""
        call_id, name = part.get("id"), _called(part).get("name")
        if call_id and self.id:
            return call_id == self.id
        return not name or (name == self.name and not self.is_complete)


@dataclass(slots=True)
class Choice:
    """One sampled answer, as far as it has arrived."""

    index: int
    prompt_ids: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    tool_calls: list[CapturedToolCall] = field(default_factory=list)
    stop_string: str | None = None
    """The stop string at which the engine ended the answer; None if the model ended it by a token."""
    fault: str | None = None
    """Why its tokens cannot be used although they arrived."""
    _texts: list[str] = field(default_factory=list)
    _thoughts: list[str] = field(default_factory=list)
    _packed_prompt_ids: bytes = b""

    @property
    def text(self) -> str:
        return "".join(self._texts)

    @property
    def reasoning(self) -> str:
        return "".join(self._thoughts)

    def add(self, part: Json) -> None:
        """Read a choice of a whole response or of a chunk. Raises TypeError, AttributeError or KeyError."""
        message = part.get("message") or part.get("delta") or {}
        text, reasoning = read_texts(message)
        text = _text(part.get("text")) or text
        ids, calls = _listed(part.get("token_ids")), message.get("tool_calls") or ()
        if isinstance(calls, dict):  # TGI
            calls = [calls]
        if function := message.get("function_call"):  # The form of OpenAI's API before tools.
            calls = [*calls, {"function": function}]
        if self.finish_reason and (ids or text or reasoning or calls):
            self.fault = f"choice {self.index} goes on after its finish_reason: two answers have the same index"
        self.prompt_ids = _listed(part.get("prompt_token_ids")) or self.prompt_ids
        self.token_ids += ids
        self.logprobs += _logprobs(part.get("logprobs") or {})
        self.finish_reason = _text(part.get("finish_reason")) or self.finish_reason
        stop = part.get("stop_reason") or part.get("matched_stop")  # The names of vLLM and SGLang.
        self.stop_string = stop if isinstance(stop, str) else self.stop_string
        if text:
            self._texts.append(text)
        if reasoning:
            self._thoughts.append(reasoning)
        for call in calls:
            self._tool_call(call, is_whole="message" in part).add(call)

    def cut_echo(self) -> None:
        """Remove the prompt's tokens, which were not sampled, from those of an answer that starts with the prompt.

        vLLM echoes the prompt's logprobs, but not its ids; other engines echo both.
        """
        prompt, ids, logprobs = len(self.prompt_ids), len(self.token_ids), len(self.logprobs)
        if logprobs == prompt + ids:
            self.logprobs = self.logprobs[prompt:]
        elif logprobs == ids and self.token_ids[:prompt] == self.prompt_ids and self.logprobs[:1] == [None]:
            self.token_ids, self.logprobs = self.token_ids[prompt:], self.logprobs[prompt:]
        else:
            self.fault = (
                f"the answer echoes the prompt: {ids} ids and {logprobs} logprobs, of a prompt of {prompt} tokens"
            )

    def message(self) -> Json:
        """The answer as a GenAI output message."""
        written = ("reasoning", self.reasoning), ("text", self.text)
        parts: list[Json] = [{"type": kind, "content": text} for kind, text in written if text]
        for call in self.tool_calls:
            parts.append({"type": "tool_call", "id": call.id, "name": call.name, "arguments": call.arguments})
        return {"role": "assistant", "parts": parts, "finish_reason": self.finish_reason}

    def packed_prompt_ids(self) -> bytes:
        """The prompt's ids, packed at the first call, which comes after the last `add`.

        Raises ValueError for values that are no token ids.
        """
        self._packed_prompt_ids = self._packed_prompt_ids or pack_ids(self.prompt_ids)
        return self._packed_prompt_ids

    def token_attributes(self) -> dict[str, bytes | str]:
        """Span attributes of the ids and logprobs that arrived, packed; if they cannot be used, the reason."""
        if self.fault is not None:
            return {semconv.TOKENS_FAULT: self.fault}
        found: dict[str, bytes | str] = {}
        try:
            if self.prompt_ids:
                found[semconv.PROMPT_TOKEN_IDS] = self.packed_prompt_ids()
            if self.token_ids:
                found[semconv.RESPONSE_TOKEN_IDS] = pack_ids(self.token_ids)
            if self.logprobs:
                found[semconv.RESPONSE_LOGPROBS] = pack_logprobs(self.logprobs)
        except ValueError as error:
            return {semconv.TOKENS_FAULT: str(error)}
        return found

    def _tool_call(self, part: Json, is_whole: bool) -> CapturedToolCall:
        """The call that `part` is a piece of, created if it is the first. In a whole response each part is a call."""
        index = part.get("index") if type(part.get("index")) is int else None
        open_calls = [] if is_whole else [call for call in self.tool_calls if index is None or call.index == index]
        for call in reversed(open_calls):
            if call.is_continued_by(part):
                return call
        self.tool_calls.append(CapturedToolCall(index=index))
        return self.tool_calls[-1]


@dataclass(slots=True)
class Capture:
    """An engine's response to one call, as far as it has arrived."""

    expected_choices: int = 1
    echoes: bool = False
    """Whether the answer was requested to start with the prompt (`echo`)."""
    response_id: str | None = None
    model: str | None = None
    usage: Json = field(default_factory=dict)
    _prompt_ids: list[int] = field(default_factory=list)
    _choices: dict[int, Choice] = field(default_factory=dict)
    _fault: str | None = None

    def add(self, chunk: Json) -> None:
        """Read the next chunk of a stream. Raises TypeError, AttributeError or KeyError on a wrong form."""
        choices = chunk.get("choices") or ()
        indexes = [choice.get("index") for choice in choices]
        if self.expected_choices == 1 and len(indexes) == 1 and type(indexes[0]) is not int:
            indexes = [0]
        if not _are_places(indexes):
            self._fault = f"a chunk has choices with index {', '.join(map(str, indexes))}: their answers are mixed up"
            indexes = [0] * len(indexes)
        self._add(chunk, choices, indexes)

    def add_whole(self, response: Json) -> None:
        """Read a whole response, whose list of choices states their order. Raises as `add` does."""
        choices = response.get("choices") or ()
        indexes = [choice.get("index") for choice in choices]
        self._add(response, choices, indexes if _are_places(indexes) else range(len(choices)))

    def _add(self, part: Json, choices: Sequence[Json], indexes: Iterable[int]) -> None:
        self.response_id = _name(part.get("id")) or self.response_id
        self.model = _name(part.get("model")) or self.model
        if usage := part.get("usage"):
            self.usage = dict(usage)
        self._prompt_ids = _listed(part.get("prompt_token_ids")) or self._prompt_ids
        for index, choice in zip(indexes, choices, strict=True):
            self._choices.setdefault(index, Choice(index)).add(choice)
        self._add_sglext(part.get("sglext") or {})

    def _add_sglext(self, tokens: Json) -> None:
        self._prompt_ids = _listed(tokens.get("input_ids")) or self._prompt_ids
        for index, ids in enumerate(tokens.get("output_ids") or ()):
            self._choices.setdefault(index, Choice(index)).token_ids = _listed(ids)

    @property
    def has_tokens(self) -> bool:
        """Whether any sampled token, text, thought or tool call has arrived."""
        return any(
            choice.token_ids or choice.text or choice.reasoning or choice.tool_calls
            for choice in self._choices.values()
        )

    def choices(self) -> list[Choice]:
        """The choices by index, each with its prompt's ids."""
        for choice in self._choices.values():
            choice.prompt_ids = choice.prompt_ids or self._prompt_ids
            choice.fault = choice.fault or self._fault
        return [self._choices[index] for index in sorted(self._choices)]

    def end(self) -> str | None:
        """To be called when the response has ended. Returns why it is not a whole answer; None if it states that it is.

        Fewer choices than requested may be several with the same index.
        """
        if not self._choices:
            return "it has no choices"
        for index, choice in self._choices.items():
            if choice.finish_reason not in COMPLETE:
                return f"choice {index} has the finish_reason {choice.finish_reason}, expected {', '.join(COMPLETE)}"
        for choice in self.choices() if self.echoes else ():
            choice.cut_echo()
        if len(self._choices) < self.expected_choices:
            self._fault = f"{self.expected_choices} choices were requested, and {len(self._choices)} arrived"
        return None


def requested_choices(request: Json) -> int:
    """The number of choices that `request` asks for: `n` for each of its prompts."""
    n, prompt = request.get("n"), request.get("prompt")
    prompts = len(prompt) if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else 1
    return prompts * n if isinstance(n, int) and n > 0 else prompts


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


def read_texts(message: Json) -> tuple[str, str]:
    """The text and the thoughts of a message or of its delta, whose content is a text or a list of parts (Mistral)."""
    content, thoughts = message.get("content"), ""
    if isinstance(content, list):
        texts = [part["text"] for part in content if part.get("type") == "text"]
        inner = [piece["text"] for part in content if part.get("type") == "thinking" for piece in part["thinking"]]
        text, thoughts = "".join(texts), "".join(inner)
    else:
        text = _text(content) or _text(message.get("refusal"))
    return text, _text(message.get("reasoning_content")) or _text(message.get("reasoning")) or thoughts


def _called(call: Json) -> Json:
    """Name and arguments of a call, or of OpenAI's custom tool its name and input."""
    return call.get("function") or call.get("custom") or {}


def _logprobs(logprobs: Json) -> list[Any]:
    """Logprobs of the sampled tokens, from the form of chat or of completions."""
    content = _listed(logprobs.get("content"))
    if content:
        return [token.get("logprob") if isinstance(token, dict) else None for token in content]
    return _listed(logprobs.get("token_logprobs"))


def _listed(value: Any) -> list[Any]:
    """`value` if it is a list; anything else is not, and becomes an item that `packing` refuses."""
    return value if isinstance(value, list) else [] if value is None else [None]


def _name(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _text(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    raise TypeError(f"{value!r:.100} is {type(value).__name__}, expected text")


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _are_places(indexes: Sequence[Any]) -> bool:
    """Whether `indexes` tell choices apart."""
    return all(type(index) is int and index >= 0 for index in indexes) and len(set(indexes)) == len(indexes)
