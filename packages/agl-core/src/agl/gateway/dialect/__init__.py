"""The APIs that clients speak. Engines are asked in OpenAI's two oldest ones, which carry token ids.

dialect    what a dialect does
plain      chat completions and completions: passed on, what the client did not ask for taken out
translated what the two others share
responses  OpenAI's Responses, from and to chat completions; `input_items` reads its input
messages   Anthropic's Messages, from and to chat completions
"""

from agl.gateway.dialect.dialect import Dialect
from agl.gateway.dialect.messages import Messages
from agl.gateway.dialect.plain import Chat, TextCompletion
from agl.gateway.dialect.responses import Responses

DIALECTS: dict[str, type[Dialect]] = {
    "/chat/completions": Chat,
    "/completions": TextCompletion,
    "/responses": Responses,
    "/messages": Messages,
}
"""By path below `/v1`."""

__all__ = ["DIALECTS", "Dialect"]
