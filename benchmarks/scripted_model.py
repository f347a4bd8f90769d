"""A LangChain chat model with scripted answers for the lookup task. It derives its step from the messages it gets."""

from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, ToolMessage
from langchain_core.messages.ai import UsageMetadata
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable
from langchain_core.tools import StructuredTool
from langchain_core.utils.function_calling import convert_to_openai_tool

from benchmarks.lookup_task import ANSWER, FACT, TOOL_CALLS

_USAGE = UsageMetadata(input_tokens=100, output_tokens=20, total_tokens=120)


class ScriptedModel(BaseChatModel):
    """Streams text word by word, and a tool call as one chunk."""

    model_name: str = "scripted"

    @property
    def _llm_type(self) -> str:
        return "scripted"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {"model": self.model_name, "model_name": self.model_name}

    def bind_tools(self, tools: Sequence[Any], **options: Any) -> Runnable[Any, AIMessage]:
        return self.bind(tools=[convert_to_openai_tool(tool) for tool in tools], **options)

    def _generate(self, messages: list[BaseMessage], *args: Any, **options: Any) -> ChatResult:
        calls = _calls(messages)
        reason = "tool_calls" if calls else "stop"
        metadata = {"model_name": self.model_name, "id": "chatcmpl-0", "finish_reason": reason}
        text = "" if calls else ANSWER
        message = AIMessage(text, tool_calls=calls, usage_metadata=_USAGE, response_metadata=metadata)
        return ChatResult(generations=[ChatGeneration(message=message)], llm_output={"model_name": self.model_name})

    async def _agenerate(self, messages: list[BaseMessage], *args: Any, **options: Any) -> ChatResult:
        return self._generate(messages)

    def _stream(
        self, messages: list[BaseMessage], stop: Any = None, run_manager: Any = None, **options: Any
    ) -> Iterator[ChatGenerationChunk]:
        for chunk in _chunks(messages):
            if run_manager is not None:
                run_manager.on_llm_new_token(chunk.text, chunk=chunk)
            yield chunk

    async def _astream(
        self, messages: list[BaseMessage], stop: Any = None, run_manager: Any = None, **options: Any
    ) -> AsyncIterator[ChatGenerationChunk]:
        for chunk in _chunks(messages):
            if run_manager is not None:
                await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
            yield chunk


def _calls(messages: Sequence[BaseMessage]) -> list[Any]:
    done = sum(isinstance(message, ToolMessage) for message in messages)
    if done == TOOL_CALLS:
        return []
    return [{"name": "lookup", "args": {"key": f"fact {done}"}, "id": f"call_{done}", "type": "tool_call"}]


def _chunks(messages: Sequence[BaseMessage]) -> Iterator[ChatGenerationChunk]:
    calls = _calls(messages)
    if calls:
        yield ChatGenerationChunk(message=AIMessageChunk("", tool_calls=calls))
    else:
        yield from (ChatGenerationChunk(message=AIMessageChunk(word + " ")) for word in ANSWER.split())
    metadata = {"model_name": "scripted", "finish_reason": "tool_calls" if calls else "stop"}
    yield ChatGenerationChunk(message=AIMessageChunk("", usage_metadata=_USAGE, response_metadata=metadata))


def lookup(key: str) -> str:
    """Look a fact up."""
    return f"{key}: {FACT}"


async def alookup(key: str) -> str:
    """Look a fact up."""
    return lookup(key)


LOOKUP = StructuredTool.from_function(lookup, alookup)
