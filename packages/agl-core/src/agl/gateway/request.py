"""Reads a client's request: its JSON body and its caller; and prepares the request for the engine.

A policy gradient weighs a token with the probability under which it was sampled, and the trainer computes the logprobs
of the full distribution. Therefore a training call loses the fields, besides the temperature, that only shape the
distribution. Those that the agent depends on, because they constrain the form of the answer, stay and are recorded.
"""

import asyncio
import hashlib
import json
import re
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, NoReturn, Self
from urllib.parse import unquote

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from agl import semconv
from agl.config.section import DEFAULT_PROJECT
from agl.context import carried_attributes, carried_entries, read_baggage
from agl.gateway.engine import USER_HEADER
from agl.gateway.engine_kind import EngineKind
from agl.seeds import derive
from agl.server.api_error import ApiError
from agl.server.auth import project_of
from agl.store import Rollout, Store
from agl.store.span_row import MAX_ID_LENGTH
from agl.tokens.capture import Json, RequestedFields

_ROLLOUT_URL: Final = re.compile("/rollout/([^/]+)/attempt/([^/]+)(/v1/.*)")
_URL_IDS: Final = "agl.url_ids"
_TRACE_CONTEXT: Final = TraceContextTextMapPropagator()
_ROLLOUTS_REMEMBERED: Final = 65_536
_ATTEMPTS_REMEMBERED: Final = 65_536
_ALIASES: Final = {"max_tokens": "max_completion_tokens", "max_completion_tokens": "max_tokens"}
"""Two names of the OpenAI API for one setting."""
_SHAPING: Final[Mapping[str, tuple[int, ...]]] = {
    "top_p": (1,),
    "top_k": (-1, 0),
    "min_p": (0,),
    "repetition_penalty": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": (),
    "bad_words": (),
    "min_tokens": (0,),
    "best_of": (1,),
    "use_beam_search": (),
}
"""Fields of vLLM and SGLang that shape or select, each with the numbers that change nothing."""
_IDS: Final = frozenset({"request_id", "rid"})
"""Fields of vLLM and SGLang that choose the id of the response: a client could take the id of another one's."""
_CONSTRAINING: Final = (
    *("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar"),  # vLLM
    *("json_schema", "regex", "ebnf", "custom_logit_processor"),  # SGLang
    *("allowed_token_ids", "logits_processors", "thinking_token_budget"),  # vLLM
)
"""Fields of vLLM and SGLang that mask or force tokens."""


@dataclass(frozen=True, slots=True)
class Caller:
    """The rollout of a call, as far as the request names it, and the span that made the call."""

    rollout_id: str | None = None
    attempt_id: str | None = None
    group_id: str | None = None
    mode: str | None = None
    role: str | None = None
    trace_id: str | None = None
    """None: the call starts a new trace."""
    parent_id: str | None = None
    seed: int | None = None
    """Seed of the rollout."""
    user: str | None = None
    """Whom the agent serves, if the headers name somebody. No span has it."""
    project: str = DEFAULT_PROJECT
    """That of the request's token: a rollout of this id in another project is another rollout."""

    @classmethod
    def read(cls, headers: Headers, url: Mapping[str, str], project: str = DEFAULT_PROJECT) -> Self:
        """From `traceparent`, `baggage` and the URL; the URL's `rollout_id` and `attempt_id` override the baggage."""
        baggage = read_baggage(",".join(headers.getlist("baggage")))
        carried = carried_attributes(baggage)
        parents = set(headers.getlist("traceparent"))  # Of several none is known to be right.
        context = _TRACE_CONTEXT.extract(headers, Context()) if len(parents) == 1 else Context()
        parent = trace.get_current_span(context).get_span_context()
        return cls(
            rollout_id=url.get("rollout_id") or carried.get(semconv.ROLLOUT_ID),
            attempt_id=url.get("attempt_id") or carried.get(semconv.ATTEMPT_ID),
            group_id=carried.get(semconv.GROUP_ID),
            mode=carried.get(semconv.MODE),
            role=carried.get(semconv.ROLE),
            trace_id=trace.format_trace_id(parent.trace_id) if parent.is_valid else None,
            parent_id=trace.format_span_id(parent.span_id) if parent.is_valid else None,
            user=carried_entries((semconv.USER,), baggage).get(semconv.USER) or headers.get(USER_HEADER),
            project=project,
        )

    def with_defaults(self, rollout: Rollout | None) -> Self:
        """Seed, and missing mode and group, from the queued `rollout`; without one the mode is `prod`."""
        if rollout is None:
            return replace(self, mode=self.mode or "prod")
        group_id = self.group_id or rollout.group_id
        return replace(self, mode=self.mode or rollout.mode, group_id=group_id, seed=rollout.seed)

    def check(self) -> None:
        """Raises ApiError for an id that no store keeps."""
        for name, value in self.attributes().items():
            if len(value) > MAX_ID_LENGTH:
                message = f"{name} has {len(value)} characters, expected at most {MAX_ID_LENGTH}"
                raise ApiError(400, "not_recordable", message)

    @property
    def rollout(self) -> str | None:
        """A key for the rollout: its id and its project."""
        return f"{self.project}/{self.rollout_id}" if self.rollout_id else None

    @property
    def pinned(self) -> tuple[str, str | None] | None:
        """Rollout and attempt of a call whose policy must not change within the rollout; None in mode `prod`."""
        return (self.rollout, self.attempt_id) if self.rollout and self.mode != "prod" else None

    def attributes(self) -> dict[str, str]:
        """Attributes of every span of the call."""
        named = {
            semconv.ROLLOUT_ID: self.rollout_id,
            semconv.ATTEMPT_ID: self.attempt_id,
            semconv.GROUP_ID: self.group_id,
            semconv.MODE: self.mode,
            semconv.ROLE: self.role,
        }
        return {name: value for name, value in named.items() if value}


class RolloutUrls:
    """ASGI middleware that serves `/rollout/{rollout_id}/attempt/{attempt_id}/v1/...` as `/v1/...`.

    The ids are percent-encoded, so that they may contain a slash.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (found := _ROLLOUT_URL.fullmatch(scope["raw_path"].decode("latin-1"))):
            rollout_id, attempt_id, path = map(unquote, found.groups())
            ids = {"rollout_id": rollout_id, "attempt_id": attempt_id}
            scope = {**scope, "path": path, "raw_path": found[3].encode("latin-1"), _URL_IDS: ids}
        await self._app(scope, receive, send)


def url_ids(scope: Scope) -> Mapping[str, str]:
    """The `rollout_id` and `attempt_id` in the URL of a request, if it has them."""
    return scope.get(_URL_IDS, {})


class CallerLookup:
    """Identifies callers. Rollouts found in `stores` are remembered: their mode, group and seed never change."""

    def __init__(self, stores: Mapping[str, Store]) -> None:
        self._stores = stores
        self._known: OrderedDict[bytes, Rollout] = OrderedDict()

    async def identify(self, request: Request) -> Caller:
        caller = Caller.read(request.headers, url_ids(request.scope), project_of(request.scope))
        caller.check()
        if caller.rollout_id is None or caller.mode == "prod":
            return caller.with_defaults(None)
        return caller.with_defaults(await self._rollout(caller.project, caller.rollout_id))

    async def _rollout(self, project: str, rollout_id: str) -> Rollout | None:
        if (key := _digest(f"{project}/{rollout_id}")) in self._known:
            self._known.move_to_end(key)
            return self._known[key]
        rollout = await asyncio.to_thread(self._stores[project].get_rollout, rollout_id)
        if rollout is not None:
            self._known[key] = replace(rollout, input=None, metadata={"seed": rollout.seed})
            if len(self._known) > _ROLLOUTS_REMEMBERED:
                self._known.popitem(last=False)
        return rollout


class Seeds:
    """Sampling seeds for the calls of each attempt. A rollout that is run again gets the same seeds in order."""

    def __init__(self) -> None:
        self._calls: OrderedDict[bytes, int] = OrderedDict()

    def next(self, caller: Caller) -> int | None:
        """Seed of the attempt's next call, derived from the rollout's seed, the attempt and the index of the call.

        The id replaces the seed that a training rollout lacks; calls of other rollouts without a seed get None.
        """
        if caller.rollout_id is None or (caller.seed is None and caller.mode != "train"):
            return None
        attempt = (caller.attempt_id or "").removeprefix(caller.rollout_id)
        key = _digest(f"{caller.rollout}\0{attempt}")
        index = self._calls.pop(key, 0)
        self._calls[key] = index + 1
        if len(self._calls) > _ATTEMPTS_REMEMBERED:
            self._calls.popitem(last=False)
        seed = derive(0, "rollout", caller.rollout_id) if caller.seed is None else caller.seed
        return derive(seed, "call", attempt, index)


def _digest(name: str) -> bytes:
    """A key of 16 bytes for a name that may be long."""
    return hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def read_json(body: bytes) -> tuple[str, Json]:
    """The body as text and as JSON object. Raises ApiError for anything else."""
    try:
        text = body.decode("utf-8-sig")
        data = _JSON.decode(text)
        if "\\u" in text:
            json.dumps(data, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "invalid_json", f"the request body is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise ApiError(400, "invalid_json", f"the request body is {type(data).__name__}, expected a JSON object")
    if not isinstance(model := data.get("model"), str | None):
        raise ApiError(400, "invalid_model", f"model is {type(model).__name__}, expected a string")
    return text, data


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number in JSON")


_JSON: Final = json.JSONDecoder(parse_constant=_refuse_constant)


def prepare(
    body: Json,
    requested: RequestedFields,
    *,
    capture: Mapping[str, Any],
    extra_body: Mapping[str, Any],
    forced: Mapping[str, Any],
    seed: int | None,
) -> Json:
    """The request for the engine. `capture` are the fields that ask for token ids and logprobs.

    `extra_body` is added where the client set nothing; a None in it removes a field that the capture would add, for
    engines that refuse the field. `forced` replaces the client's values. `seed` is used if nothing else sets one.
    """
    has_value = {name: bool(body.get(name)) for name in capture} | {"logprobs": requested.logprobs}
    sent = {name: value for name, value in body.items() if name not in _IDS}
    for name, value in ({**capture, "seed": seed} | dict(extra_body)).items():
        if value is not None and not has_value.get(name, _sets(body, name)):
            sent[name] = value
    for name, value in forced.items():
        sent.pop(_ALIASES.get(name, name), None)
        sent[name] = value
    return sent


def changes(body: Json, sent: Json) -> Json:
    """The fields in which the engine's request differs from `body`; None for a field that was removed."""
    return {name: sent.get(name) for name in (*sent, *(body.keys() - sent)) if sent.get(name) != body.get(name)}


def _sets(body: Json, name: str) -> bool:
    return body.get(name) is not None or body.get(_ALIASES.get(name, name)) is not None


def with_full_distribution(
    request: Json, kind: EngineKind, extra_body: Mapping[str, Any], declared: Collection[str] = ()
) -> Json:
    """`request` without the fields that shape the distribution, and with the engine's neutral values.

    Fields in `declared`, for which the trainer accounts, stay. A field that `extra_body` sets to None is for engines
    that refuse it, and is left out.
    """
    kept = {name: value for name, value in request.items() if name not in _SHAPING or name in declared}
    refused = {name for name, value in extra_body.items() if value is None}
    return {name: value for name, value in kind.neutral_sampling.items() if name not in refused} | kept


def shaping(forced: Mapping[str, Any]) -> Json:
    """Those of the `forced` fields that shape the distribution."""
    return {name: value for name, value in forced.items() if name in _SHAPING}


def constraints(request: Json, kind: EngineKind, declared: Collection[str] = ()) -> list[str]:
    """Names of the fields in `request`, except `declared`, due to which the engine does not sample from the full
    distribution."""
    found = [name for name, neutral in _SHAPING.items() if _is_set(request.get(name), neutral) and name not in declared]
    found += [name for name in _CONSTRAINING if _is_set(request.get(name))]
    if _is_set(response_format := request.get("response_format")) and response_format != {"type": "text"}:
        found.append("response_format")
    return found + (_tool_constraints(request) if kind.masks_tool_calls else [])


def _tool_constraints(request: Json) -> list[str]:
    choice, tools = request.get("tool_choice"), request.get("tools")
    if choice == "none" or not isinstance(tools, list):
        return []
    functions = [tool.get("function") for tool in tools if isinstance(tool, dict)]
    is_strict = any(isinstance(function, dict) and function.get("strict") is True for function in functions)
    return ["tool_choice"] * (choice not in (None, "auto")) + ["tools[].function.strict"] * is_strict


def _is_set(value: Any, neutral: tuple[int, ...] = ()) -> bool:
    is_empty = value is None or value is False or value in ("", {}, [])
    return not is_empty and value not in neutral
