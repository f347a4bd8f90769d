"""Messages and tools of the OpenAI API, validated: what chat requests and training examples share."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator


def _join_parts(content: Any) -> Any:
    """Content parts as one string, joined by newlines as in vLLM."""
    return "\n".join(map(_part_text, content)) if isinstance(content, list) else content


def _part_text(part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    text = part.get(kind) if isinstance(part, dict) and kind in ("text", "refusal") else None
    if not isinstance(text, str):
        raise ValueError(f"content part of type {kind!r} is not supported; this engine reads text only")
    return text


class ApiObject(BaseModel):
    """An object of the API; unknown fields are ignored."""

    model_config = ConfigDict(strict=True, frozen=True)


class CalledFunction(ApiObject):
    name: str
    arguments: str = "{}"


class MessageToolCall(ApiObject):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(ApiObject):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | None, BeforeValidator(_join_parts)] = None
    name: str | None = None
    tool_calls: list[MessageToolCall] | None = None
    tool_call_id: str | None = None
    function_call: None = None

    @model_validator(mode="after")
    def _has_content_unless_assistant(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise ValueError(f"a message of role {self.role!r} needs content")
        return self

    def turn(self) -> dict[str, Any]:
        """The message as a chat template takes it."""
        role = "system" if self.role == "developer" else self.role
        return self.model_dump(exclude_none=True) | {"role": role}


class ToolFunction(ApiObject):
    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class ToolSpec(ApiObject):
    type: Literal["function"]
    function: ToolFunction


class Conversation(ApiObject):
    """Messages, and the tools that the assistant may call."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    tools: list[ToolSpec] = []

    def turns(self) -> list[dict[str, Any]]:
        """The messages as a chat template takes them."""
        return [message.turn() for message in self.messages]

    def tool_definitions(self) -> list[dict[str, Any]]:
        """The tools as a chat template takes them."""
        return [tool.model_dump(exclude_none=True) for tool in self.tools]


def describe(error: ValidationError) -> str:
    """A sentence for each invalid field, with its path and its value."""
    return "; ".join(describe_field(field) for field in error.errors())


def describe_field(field: Any) -> str:
    """A sentence on one entry of `ValidationError.errors()`."""
    path = ".".join(str(part) for part in field["loc"])
    message = field["msg"].removeprefix("Value error, ")
    return f"{path}: {message} (got {shorten(field['input'])})" if path else message


def shorten(value: object) -> str:
    """`repr` of `value` in at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
