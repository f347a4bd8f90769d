"""Converts messages and tools to token ids with the tokenizer's chat template.

Messages and tools are mappings as in the OpenAI API, with strings as contents. A template that supports tools in the
`<tool_call>` format receives them unchanged. For other templates the system message describes the tools, the
assistant's text contains the calls, and tool results become user turns.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from agl.errors import AglError
from agl_trainer.data.tool_call import OPEN, ToolCall

Message = Mapping[str, Any]
Tool = Mapping[str, Any]

_MARK = "agl_probe"


class ChatTemplateError(AglError):
    """The model has no chat template, or its template rejects the messages."""


class ChatTemplate:
    """The chat template of a tokenizer. Its abilities are determined by rendering probes, not by the model's name."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.supports_tools = self._probe_tools()
        """Whether the template writes tools in the `<tool_call>` format."""
        self.end_of_turn = self._probe_end_of_turn()
        """The token that ends an assistant's turn; None if neither template nor tokenizer defines one."""

    @property
    def stop_token_ids(self) -> frozenset[int]:
        """Tokens that end a response."""
        ids = (self.end_of_turn, self._tokenizer.eos_token_id)
        return frozenset(token_id for token_id in ids if isinstance(token_id, int))

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[int]:
        """Token ids of the conversation up to the start of the assistant's response. Raises ChatTemplateError."""
        return self.encode(self.prompt_text(messages, tools))

    def prompt_text(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> str:
        """Text of the conversation up to the start of the assistant's response. Raises ChatTemplateError."""
        return self._conversation(messages, tools, add_generation_prompt=True)

    def answer_ids(self, messages: Sequence[Message], tools: Sequence[Tool], answer: Message) -> list[int]:
        """Token ids of the assistant's message `answer` after its prompt, to the end of the turn.

        Raises ChatTemplateError if the template rejects it, or writes the prompt differently before it.
        """
        prompt = self.prompt_text(messages, tools)
        whole = self._conversation([*messages, answer], tools, add_generation_prompt=False)
        if not whole.startswith(prompt):
            raise ChatTemplateError(
                "the model's chat template writes the prompt before this message otherwise than for a request; give "
                "the answer as text"
            )
        ids = self.encode(whole.removeprefix(prompt))
        if self.end_of_turn is None:
            return ids
        place = ids.index(self.end_of_turn) if self.end_of_turn in ids else len(ids)
        return [*ids[:place], self.end_of_turn]

    def _conversation(self, messages: Sequence[Message], tools: Sequence[Tool], *, add_generation_prompt: bool) -> str:
        if self.supports_tools:
            return self._render([_native(message) for message in messages], tools, add_generation_prompt)
        return self._render(list(_plain(messages, tools)), add_generation_prompt=add_generation_prompt)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, which already contains its special tokens."""
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def _render(
        self, messages: Sequence[Message], tools: Sequence[Tool] = (), add_generation_prompt: bool = True
    ) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=[dict(tool) for tool in tools] or None,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except TemplateError as error:
            raise ChatTemplateError(f"the model's chat template rejects these messages: {error}") from error
        except ValueError as error:
            raise ChatTemplateError(f"the model has no usable chat template; use /v1/completions ({error})") from error
        assert isinstance(text, str)
        return text

    def _probe_tools(self) -> bool:
        tool = {"type": "function", "function": {"name": _MARK, "description": "", "parameters": {"type": "object"}}}
        try:
            text = self._render([{"role": "user", "content": ""}], [tool])
        except ChatTemplateError:
            return False
        return _MARK in text and OPEN in text

    def _probe_end_of_turn(self) -> int | None:
        turns = [{"role": "user", "content": ""}, {"role": "assistant", "content": _MARK}]
        try:
            tail = self._render(turns, add_generation_prompt=False).rpartition(_MARK)[2]
        except ChatTemplateError:
            tail = ""
        special = set(special_tokens(self._tokenizer).values())
        eos = self._tokenizer.eos_token_id
        return next((i for i in self.encode(tail) if i in special), eos if isinstance(eos, int) else None)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Text to id of all special tokens, including those without a function such as `eos`."""
    added = {str(token): token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))


def answer_text(message: Message) -> str:
    """An assistant message in the model's format: content, then tool calls."""
    functions = [call["function"] for call in message.get("tool_calls") or ()]
    calls = "\n".join(ToolCall(function["name"], function["arguments"]).text() for function in functions)
    return (message.get("content") or "") + calls


def _native(message: Message) -> dict[str, Any]:
    """The message for a template that supports tools; most of them expect arguments as an object."""
    native = {"content": "", **message}
    if calls := message.get("tool_calls"):
        native["tool_calls"] = [{**call, "function": _with_parsed_arguments(call["function"])} for call in calls]
    return native


def _with_parsed_arguments(function: Mapping[str, Any]) -> dict[str, Any]:
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        arguments = function["arguments"]
    return {**function, "arguments": arguments}


def _plain(messages: Sequence[Message], tools: Sequence[Tool]) -> Iterator[dict[str, str]]:
    """Turns for a template that supports only the roles system, user and assistant."""
    rest = list(messages)
    if tools:
        system = rest.pop(0)["content"] + "\n\n" if rest and rest[0]["role"] == "system" else ""
        yield {"role": "system", "content": system + _describe(tools)}
    for is_result, turns in groupby(rest, key=lambda message: message["role"] == "tool"):
        if is_result:
            results = [f"<tool_response>\n{turn['content']}\n</tool_response>" for turn in turns]
            yield {"role": "user", "content": "\n".join(results)}
        else:
            yield from ({"role": turn["role"], "content": answer_text(turn)} for turn in turns)


def _describe(tools: Sequence[Tool]) -> str:
    fields = ("name", "description", "parameters")
    functions = ({field: tool["function"][field] for field in fields if field in tool["function"]} for tool in tools)
    listed = "\n".join(json.dumps(function, ensure_ascii=False) for function in functions)
    return f"You can call these tools:\n{listed}\nTo call one, answer with {ToolCall('tool name', '{...}').text()}"
