"""The engine's own tokenizer and chat template, asked over HTTP beside its API: `/tokenize` and `/detokenize`."""

import asyncio
import json
from collections.abc import Mapping, Sequence

import aiohttp

from agl.errors import GatewayError
from agl.gateway.engine import Engine
from agl.tokens.capture import Json

_TEMPLATE_FIELDS = ("model", "tools", "chat_template", "chat_template_kwargs")
_LONGEST_ERROR = 200


class TokenizerError(GatewayError):
    """The engine does not say, and why."""


class Tokenizer:
    """That of `engine`. `headers` are the call's; an answer takes `timeout_s` at most."""

    def __init__(
        self, session: aiohttp.ClientSession, engine: Engine, headers: Mapping[str, str], timeout_s: float
    ) -> None:
        self._session = session
        self._engine = engine
        self._headers = {name: value for name, value in engine.headers(headers).items() if name != "content-type"}
        self._timeout_s = timeout_s

    async def prompt(self, request: Json, messages: Sequence[Json]) -> list[int]:
        """What the chat template makes of `messages` in place of those of `request`. Raises TokenizerError."""
        body = {name: request[name] for name in _TEMPLATE_FIELDS if request.get(name) is not None}
        if effort := request.get("reasoning_effort"):  # So vLLM hands it to the template in a chat completion.
            body["chat_template_kwargs"] = {"reasoning_effort": effort} | (body.get("chat_template_kwargs") or {})
        answer = await self._ask("/tokenize", body | {"messages": messages, "add_generation_prompt": True})
        ids = answer.get("tokens")
        if not isinstance(ids, list) or not ids or not all(type(item) is int for item in ids):
            raise TokenizerError("/tokenize answered without tokens")
        return ids

    async def text(self, model: str, ids: Sequence[int]) -> str:
        """Special tokens included. Raises TokenizerError."""
        shape = self._engine.shape
        text = (await self._ask("/detokenize", {"model": model} | shape.to_detokenize(ids))).get(shape.detokenized)
        if not isinstance(text, str):
            raise TokenizerError("/detokenize answered without text")
        return text

    async def _ask(self, path: str, body: Json) -> Json:
        url = self._engine.url.removesuffix("/v1") + path
        try:
            async with (
                asyncio.timeout(self._timeout_s),
                self._session.post(url, json=body, headers=self._headers, allow_redirects=False) as response,
            ):
                text = await response.text()
                answer = json.loads(text) if response.status == 200 else None
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise TokenizerError(f"{path}: {error or type(error).__name__}") from error
        if not isinstance(answer, dict):
            raise TokenizerError(f"{path} answered {response.status}: {text[:_LONGEST_ERROR]}")
        return answer
