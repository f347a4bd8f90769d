"""Choices in the shape of the OpenAI API, with token ids where vLLM puts them.

An answer is one `body`, or a stream: `chunks` for each step, then `closing`.
"""

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol

from agl_trainer.data.tool_call import ToolCall
from agl_trainer.engine.http.choice import Choice, Step
from agl_trainer.engine.http.tool_call_parser import ToolCallReader
from agl_trainer.engine.http.validation import ChatRequest, CompletionRequest, RequestT
from agl_trainer.engine.protocol import SampledToken

Json = dict[str, Any]
TokenText = Callable[[int], str]

_UNFINISHED: Json = {"finish_reason": None}

_LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot write."""


class Answer(Protocol):
    """What the HTTP layer sends."""

    choices: Sequence[Choice]

    @property
    def streamed(self) -> bool: ...
    def body(self) -> Json: ...
    def chunks(self, step: Step) -> Iterator[Json]: ...
    def closing(self) -> Iterator[Json]: ...


@dataclass
class _Answer(Generic[RequestT]):
    """The envelope that both endpoints share. `choices` holds `n` choices for each prompt, prompt by prompt."""

    id: str
    asked: RequestT
    choices: Sequence[Choice]
    token_text: TokenText
    created: int = field(default_factory=lambda: int(time.time()))
    _opened: set[int] = field(default_factory=set)

    @property
    def streamed(self) -> bool:
        return self.asked.stream

    def _envelope(self, kind: str, version: str, choices: list[Json]) -> Json:
        return {"id": self.id, "object": kind, "created": self.created, "model": version, "choices": choices}

    def _is_first(self, choice: Choice) -> bool:
        """Whether nothing of `choice` was sent before."""
        first = choice.index not in self._opened
        self._opened.add(choice.index)
        return first

    def _usage(self) -> Json:
        prompt = sum(len(choice.prompt_ids) for choice in self.choices[:: self.asked.n])
        completion = sum(len(choice.tokens) for choice in self.choices)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def _usage_chunk(self, kind: str) -> Iterator[Json]:
        if self.asked.wants_usage_chunk:
            yield self._envelope(kind, self.choices[0].version, []) | {"usage": self._usage()}

    def _ids(self, tokens: Sequence[SampledToken]) -> Json:
        return {"token_ids": [token.token_id for token in tokens]} if self.asked.return_token_ids else {}


@dataclass
class ChatAnswer(_Answer[ChatRequest]):
    """POST /v1/chat/completions. `answer_start` is the part of the answer that the prompt already holds."""

    answer_start: str = ""

    def __post_init__(self) -> None:
        offered = self.choices if self.asked.offered_tools else ()
        self._readers = {choice.index: ToolCallReader(self.answer_start) for choice in offered}

    def body(self) -> Json:
        choices = [self._choice(choice) for choice in self.choices]
        body = self._envelope("chat.completion", self.choices[0].version, choices) | {"usage": self._usage()}
        return body | self._prompt_ids()

    def chunks(self, step: Step) -> Iterator[Json]:
        if self._is_first(step.choice):
            yield self._chunk(step.choice, {"role": "assistant", "content": ""}) | self._prompt_ids()
        reader = self._readers.get(step.choice.index)
        content = reader.feed(step.text) if reader else step.text
        tokens = [step.token] if step.token else []
        reported = tokens if self.asked.logprobs or self.asked.return_token_ids else []
        if content or reported:
            yield self._chunk(step.choice, {"content": content}, tokens)
        if step.finished:
            yield from self._last_chunks(step.choice, reader)

    def closing(self) -> Iterator[Json]:
        return self._usage_chunk("chat.completion.chunk")

    def _last_chunks(self, choice: Choice, reader: ToolCallReader | None) -> Iterator[Json]:
        content, calls = self._rest(reader)
        if content:
            yield self._chunk(choice, {"content": content})
        if calls:
            deltas = [{"index": index, **_tool_call(call)} for index, call in enumerate(calls)]
            yield self._chunk(choice, {"tool_calls": deltas})
        yield self._chunk(choice, {}, finish=_finish(choice, calls))

    def _chunk(
        self, choice: Choice, delta: Json, tokens: Sequence[SampledToken] = (), finish: Json = _UNFINISHED
    ) -> Json:
        shaped = {"index": choice.index, "delta": delta, "logprobs": None, **finish}
        if tokens:
            shaped |= {"logprobs": self._logprobs(tokens)} | self._ids(tokens)
        return self._envelope("chat.completion.chunk", choice.version, [shaped])

    def _choice(self, choice: Choice) -> Json:
        reader = self._readers.get(choice.index)
        said = reader.feed(choice.text) if reader else choice.text
        rest, calls = self._rest(reader)
        content = said + rest
        message: Json = {"role": "assistant", "content": content if content or not calls else None, "refusal": None}
        if calls:
            message["tool_calls"] = [_tool_call(call) for call in calls]
        shaped = {"index": choice.index, "message": message, "logprobs": self._logprobs(choice.tokens)}
        return shaped | _finish(choice, calls) | self._ids(choice.tokens)

    def _rest(self, reader: ToolCallReader | None) -> tuple[str, list[ToolCall]]:
        content, calls = reader.finish() if reader else ("", [])
        return content, calls if self.asked.parallel_tool_calls else calls[:1]

    def _prompt_ids(self) -> Json:
        return {"prompt_token_ids": self.choices[0].prompt_ids} if self.asked.return_token_ids else {}

    def _logprobs(self, tokens: Sequence[SampledToken]) -> Json | None:
        return {"content": [self._logprob(token) for token in tokens]} if self.asked.logprobs else None

    def _logprob(self, token: SampledToken) -> Json:
        top = [_named(self.token_text(token_id), logprob) for token_id, logprob in token.top]
        return _named(self.token_text(token.token_id), token.logprob) | {"top_logprobs": top}


@dataclass
class CompletionAnswer(_Answer[CompletionRequest]):
    """POST /v1/completions."""

    def __post_init__(self) -> None:
        self._offsets = {choice.index: 0 for choice in self.choices}

    def body(self) -> Json:
        choices = [self._choice(choice, choice.text, choice.tokens, _finish(choice, [])) for choice in self.choices]
        return self._envelope("text_completion", self.choices[0].version, choices) | {"usage": self._usage()}

    def chunks(self, step: Step) -> Iterator[Json]:
        tokens = [step.token] if step.token else []
        finish = _finish(step.choice, []) if step.finished else _UNFINISHED
        choice = self._choice(step.choice, step.text, tokens, finish)
        yield self._envelope("text_completion", step.choice.version, [choice])

    def closing(self) -> Iterator[Json]:
        return self._usage_chunk("text_completion")

    def _choice(self, choice: Choice, text: str, tokens: Sequence[SampledToken], finish: Json) -> Json:
        shaped = {"index": choice.index, "text": text, "logprobs": self._logprobs(choice.index, tokens)}
        return shaped | finish | self._ids(tokens) | self._prompt_ids(choice)

    def _prompt_ids(self, choice: Choice) -> Json:
        """The prompt's token ids, once for each choice."""
        wanted = self.asked.return_token_ids and self._is_first(choice)
        return {"prompt_token_ids": choice.prompt_ids} if wanted else {}

    def _logprobs(self, index: int, tokens: Sequence[SampledToken]) -> Json | None:
        if self.asked.logprobs is None:
            return None
        texts = [self.token_text(token.token_id) for token in tokens]
        offsets = [self._advance(index, len(text)) for text in texts]
        logprobs = [_finite(token.logprob) for token in tokens]
        top = [self._top(token) for token in tokens] if self.asked.logprobs else None
        return {"tokens": texts, "token_logprobs": logprobs, "top_logprobs": top, "text_offset": offsets}

    def _advance(self, index: int, length: int) -> int:
        """Where a token of `length` characters starts in the choice's text."""
        self._offsets[index] += length
        return self._offsets[index] - length

    def _top(self, token: SampledToken) -> dict[str, float]:
        pairs = [*token.top, (token.token_id, token.logprob)]
        return {self.token_text(token_id): _finite(logprob) for token_id, logprob in pairs}


def _finish(choice: Choice, calls: Sequence[ToolCall]) -> Json:
    reason = "tool_calls" if calls and choice.finish_reason == "stop" else choice.finish_reason
    return {"finish_reason": reason, "stop_reason": choice.stop_string}


def _tool_call(call: ToolCall) -> Json:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": function}


def _named(text: str, logprob: float) -> Json:
    """`bytes` is null where the token is a part of a character."""
    return {"token": text, "logprob": _finite(logprob), "bytes": None if "\ufffd" in text else list(text.encode())}


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST_LOGPROB)
