"""Builds OpenAI API responses from choices, with token ids in the fields that vLLM uses.

A response is one `body`, or a stream of `chunks` for each delta followed by `final_chunks`.
"""

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic

from agl_trainer.data.tool_call import ToolCall
from agl_trainer.engine.http.choice_stream import ChoiceDelta, ChoiceStream
from agl_trainer.engine.http.openai_request import ChatRequest, CompletionRequest, RequestT
from agl_trainer.engine.http.tool_call_parser import ToolCallParser
from agl_trainer.engine.protocol import SampledToken

Json = dict[str, Any]
TokenText = Callable[[int], str]

_UNFINISHED: Json = {"finish_reason": None}

_LOWEST_LOGPROB = -9999.0
"""Replaces minus infinity, which JSON cannot represent."""


@dataclass
class _Builder(Generic[RequestT]):
    """Fields that both endpoints share. `choices` has `n` choices for each prompt, prompt by prompt."""

    id: str
    request: RequestT
    choices: Sequence[ChoiceStream]
    token_text: TokenText
    created: int = field(default_factory=lambda: int(time.time()))
    _started: set[int] = field(default_factory=set)

    @property
    def is_streamed(self) -> bool:
        return self.request.stream

    def _envelope(self, kind: str, version: str, choices: list[Json]) -> Json:
        return {"id": self.id, "object": kind, "created": self.created, "model": version, "choices": choices}

    def _is_first(self, choice: ChoiceStream) -> bool:
        """Whether this is the first call for `choice`."""
        first = choice.index not in self._started
        self._started.add(choice.index)
        return first

    def _usage(self) -> Json:
        prompt = sum(len(choice.prompt_ids) for choice in self.choices[:: self.request.n])
        completion = sum(len(choice.tokens) for choice in self.choices)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def _usage_chunk(self, kind: str) -> Iterator[Json]:
        if self.request.wants_usage_chunk:
            yield self._envelope(kind, self.choices[0].version, []) | {"usage": self._usage()}

    def _token_ids(self, tokens: Sequence[SampledToken]) -> Json:
        return {"token_ids": [token.token_id for token in tokens]} if self.request.return_token_ids else {}


@dataclass
class ChatResponseBuilder(_Builder[ChatRequest]):
    """Response of POST /v1/chat/completions. `answer_start` is the part of the answer that the prompt ends with."""

    answer_start: str = ""

    def __post_init__(self) -> None:
        with_tools = self.choices if self.request.offered_tools else ()
        self._parsers = {choice.index: ToolCallParser(self.answer_start) for choice in with_tools}

    def body(self) -> Json:
        choices = [self._choice(choice) for choice in self.choices]
        body = self._envelope("chat.completion", self.choices[0].version, choices) | {"usage": self._usage()}
        return body | self._prompt_ids()

    def chunks(self, delta: ChoiceDelta) -> Iterator[Json]:
        if self._is_first(delta.choice):
            yield self._chunk(delta.choice, {"role": "assistant", "content": ""}) | self._prompt_ids()
        parser = self._parsers.get(delta.choice.index)
        content = parser.feed(delta.text) if parser else delta.text
        tokens = [delta.token] if delta.token else []
        reported = tokens if self.request.logprobs or self.request.return_token_ids else []
        if content or reported:
            yield self._chunk(delta.choice, {"content": content}, tokens)
        if delta.is_last:
            yield from self._last_chunks(delta.choice, parser)

    def final_chunks(self) -> Iterator[Json]:
        return self._usage_chunk("chat.completion.chunk")

    def _last_chunks(self, choice: ChoiceStream, parser: ToolCallParser | None) -> Iterator[Json]:
        content, calls = self._finish(parser)
        if content:
            yield self._chunk(choice, {"content": content})
        if calls:
            deltas = [{"index": index, **_tool_call(call)} for index, call in enumerate(calls)]
            yield self._chunk(choice, {"tool_calls": deltas})
        yield self._chunk(choice, {}, finish=_finish_fields(choice, calls))

    def _chunk(
        self, choice: ChoiceStream, delta: Json, tokens: Sequence[SampledToken] = (), finish: Json = _UNFINISHED
    ) -> Json:
        fields = {"index": choice.index, "delta": delta, "logprobs": None, **finish}
        if tokens:
            fields |= {"logprobs": self._logprobs(tokens)} | self._token_ids(tokens)
        return self._envelope("chat.completion.chunk", choice.version, [fields])

    def _choice(self, choice: ChoiceStream) -> Json:
        parser = self._parsers.get(choice.index)
        start = parser.feed(choice.text) if parser else choice.text
        rest, calls = self._finish(parser)
        content = start + rest
        message: Json = {"role": "assistant", "content": content if content or not calls else None, "refusal": None}
        if calls:
            message["tool_calls"] = [_tool_call(call) for call in calls]
        fields = {"index": choice.index, "message": message, "logprobs": self._logprobs(choice.tokens)}
        return fields | _finish_fields(choice, calls) | self._token_ids(choice.tokens)

    def _finish(self, parser: ToolCallParser | None) -> tuple[str, list[ToolCall]]:
        content, calls = parser.finish() if parser else ("", [])
        return content, calls if self.request.parallel_tool_calls else calls[:1]

    def _prompt_ids(self) -> Json:
        return {"prompt_token_ids": self.choices[0].prompt_ids} if self.request.return_token_ids else {}

    def _logprobs(self, tokens: Sequence[SampledToken]) -> Json | None:
        return {"content": [self._logprob(token) for token in tokens]} if self.request.logprobs else None

    def _logprob(self, token: SampledToken) -> Json:
        top = [_token_fields(self.token_text(token_id), logprob) for token_id, logprob in token.top]
        return _token_fields(self.token_text(token.token_id), token.logprob) | {"top_logprobs": top}


@dataclass
class CompletionResponseBuilder(_Builder[CompletionRequest]):
    """Response of POST /v1/completions."""

    def __post_init__(self) -> None:
        self._offsets = {choice.index: 0 for choice in self.choices}

    def body(self) -> Json:
        choices = [self._choice(choice, choice.text, choice.tokens, is_last=True) for choice in self.choices]
        return self._envelope("text_completion", self.choices[0].version, choices) | {"usage": self._usage()}

    def chunks(self, delta: ChoiceDelta) -> Iterator[Json]:
        tokens = [delta.token] if delta.token else []
        choice = self._choice(delta.choice, delta.text, tokens, is_last=delta.is_last)
        yield self._envelope("text_completion", delta.choice.version, [choice])

    def final_chunks(self) -> Iterator[Json]:
        return self._usage_chunk("text_completion")

    def _choice(self, choice: ChoiceStream, text: str, tokens: Sequence[SampledToken], *, is_last: bool) -> Json:
        finish = _finish_fields(choice, []) if is_last else _UNFINISHED
        fields = {"index": choice.index, "text": text, "logprobs": self._logprobs(choice.index, tokens)}
        return fields | finish | self._token_ids(tokens) | self._prompt_ids(choice)

    def _prompt_ids(self, choice: ChoiceStream) -> Json:
        """The prompt's token ids, only once for each choice."""
        wanted = self.request.return_token_ids and self._is_first(choice)
        return {"prompt_token_ids": choice.prompt_ids} if wanted else {}

    def _logprobs(self, index: int, tokens: Sequence[SampledToken]) -> Json | None:
        if self.request.logprobs is None:
            return None
        texts = [self.token_text(token.token_id) for token in tokens]
        offsets = [self._next_offset(index, len(text)) for text in texts]
        logprobs = [_finite(token.logprob) for token in tokens]
        top = [self._top(token) for token in tokens] if self.request.logprobs else None
        return {"tokens": texts, "token_logprobs": logprobs, "top_logprobs": top, "text_offset": offsets}

    def _next_offset(self, index: int, length: int) -> int:
        """Offset in the text of choice `index` of its next token, which has `length` characters."""
        self._offsets[index] += length
        return self._offsets[index] - length

    def _top(self, token: SampledToken) -> dict[str, float]:
        pairs = [*token.top, (token.token_id, token.logprob)]
        return {self.token_text(token_id): _finite(logprob) for token_id, logprob in pairs}


AnyBuilder = ChatResponseBuilder | CompletionResponseBuilder


def _finish_fields(choice: ChoiceStream, calls: Sequence[ToolCall]) -> Json:
    reason = "tool_calls" if calls and choice.finish_reason == "stop" else choice.finish_reason
    return {"finish_reason": reason, "stop_reason": choice.stop_string}


def _tool_call(call: ToolCall) -> Json:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": function}


def _token_fields(text: str, logprob: float) -> Json:
    """`bytes` is null if the token is only a part of a character."""
    return {"token": text, "logprob": _finite(logprob), "bytes": None if "\ufffd" in text else list(text.encode())}


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST_LOGPROB)
