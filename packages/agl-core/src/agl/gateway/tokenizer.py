"""The engine's own tokenizer and chat template, over HTTP: `/tokenize` and `/detokenize` beside `/v1`."""

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Final

import aiohttp

from agl.errors import GatewayError
from agl.gateway.conversation import TEMPLATE_FIELDS
from agl.gateway.engine import Engine
from agl.tokens.capture import Json

_SENT_FIELDS: Final = ("model", *(name for name in TEMPLATE_FIELDS if name not in ("reasoning_effort", "documents")))
"""Those that vLLM's `/tokenize` knows; `reasoning_effort` goes into `chat_template_kwargs`."""
_LONGEST_ERROR: Final = 200


class TokenizerError(GatewayError):
    """`/tokenize` or `/detokenize` failed; the message has the reason."""


class Tokenizer:
    """The tokenizer of `engine`. `headers` are the client's; a response may take `timeout_s` seconds."""

    def __init__(
        self, session: aiohttp.ClientSession, engine: Engine, headers: Mapping[str, str], timeout_s: float
    ) -> None:
        self._session = session
        self._engine = engine
        self._headers = {name: value for name, value in engine.headers(headers).items() if name != "content-type"}
        self._timeout_s = timeout_s

    async def tokenize(self, request: Json, messages: Sequence[Json]) -> list[int]:
        """Ids of the prompt of a chat completion `request` with `messages`. Raises TokenizerError."""
        body = {name: request[name] for name in _SENT_FIELDS if request.get(name) is not None}
        if effort := request.get("reasoning_effort"):  # As vLLM passes it to the template of a chat completion.
            body["chat_template_kwargs"] = {"reasoning_effort": effort} | (body.get("chat_template_kwargs") or {})
        response = await self._post("/tokenize", body | {"messages": messages, "add_generation_prompt": True})
        ids = response.get("tokens")
        if not isinstance(ids, list) or not ids or not all(type(item) is int for item in ids):
            raise TokenizerError("/tokenize answered without tokens")
        return ids

    async def detokenize(self, model: str, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens included. Raises TokenizerError."""
        kind = self._engine.kind
        response = await self._post("/detokenize", {"model": model} | kind.detokenize_body(ids))
        text = response.get(kind.detokenized_field)
        if not isinstance(text, str):
            raise TokenizerError("/detokenize answered without text")
        return text

    async def _post(self, path: str, body: Json) -> Json:
        url = self._engine.url.removesuffix("/v1") + path
        try:
            async with (
                asyncio.timeout(self._timeout_s),
                self._session.post(url, json=body, headers=self._headers, allow_redirects=False) as response,
            ):
                text = await response.text()
                data = json.loads(text) if response.status == 200 else None
        except (aiohttp.ClientError, TimeoutError, ValueError, RecursionError) as error:
            raise TokenizerError(f"{path}: {error or type(error).__name__}") from error
        if not isinstance(data, dict):
            raise TokenizerError(f"{path} answered {response.status}: {text[:_LONGEST_ERROR]}")
        return data
