"""Tool calls as text: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, in prompts and in answers."""

import json
from dataclasses import dataclass

OPEN, CLOSE = "<tool_call>", "</tool_call>"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool call of the assistant; `arguments` is the text of a JSON object."""

    name: str
    arguments: str

    def text(self) -> str:
        """The call in the model's format."""
        return f"{forced_start(self.name)} {self.arguments}}}{CLOSE}"


def forced_start(name: str | None) -> str:
    """Beginning of a response that must call the tool `name`, or any tool; it precedes the first sampled token."""
    if name is None:
        return f'{OPEN}{{"name":'
    return f'{OPEN}{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments":'
