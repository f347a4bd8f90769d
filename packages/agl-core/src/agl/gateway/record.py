"""The record of a call: collected while the call is under way, turned into spans, and committed to the store."""

import asyncio
import json
import random
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram

from agl import semconv
from agl.config.section import DEFAULT_PROJECT
from agl.content.media import MIN_CHARACTERS, note_stored, referenced
from agl.gateway.conversation import Position
from agl.gateway.engine import Engine
from agl.gateway.request import Caller
from agl.server.api_error import ApiError, error_in
from agl.span import AttributeValue, Span, now_ns
from agl.store import Store
from agl.store.span_row import SpanRow
from agl.store.traffic import Intake
from agl.tokens.capture import Capture, Choice, Json
from agl.tokens.drift import Drifted

_CLIENT_KIND = 3
_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_MAX_ROLES = 100
_SCOPE = "agl.gateway"
_PendingCall = tuple[str, list[SpanRow], asyncio.Future[None]]
"""Its project, its rows, and what waits for their commit."""


@dataclass(slots=True)
class CallRecord:
    """One model call while it is under way: the caller, the request, the way to an engine, the response so far."""

    caller: Caller
    operation: str
    path: str
    """Below the engine's base URL."""
    headers: Mapping[str, str]
    """The client's headers that are forwarded."""
    engine_model: str
    """Model name for the engines; empty if the client named none."""
    sent: Json
    """The request for the engine."""
    client_body: str = ""
    """The client's request: JSON text as received."""
    policy: str = ""
    """The role, policy or version that the client's name means."""
    model: str | None = None
    """Model name in the client's request."""
    changed: Json = field(default_factory=dict)
    """Fields in which `sent` differs from the client's request; None for a field that was removed."""
    constraints: list[str] = field(default_factory=list)
    """Fields of `sent` due to which the engine does not sample from the full distribution."""
    sampling: Json = field(default_factory=dict)
    """Fields of `sent` that shape the distribution, and that the training accounts for."""
    position: Position | None = None
    """Position in a conversation, for a chat of a known rollout or trace."""
    capture: Capture = field(default_factory=Capture)
    body: bytes = b""
    """The body that is posted: `sent`, or `sent` with an exact prompt, as JSON."""
    engine: Engine | None = None
    """The engine chosen, then the one last tried, in the end the one that answers."""
    queue_ns: int = 0
    """Time spent waiting for slots, in nanoseconds."""
    retries: list[str] = field(default_factory=list)
    """Reason of failure of each attempt except the last."""
    start_ns: int = field(default_factory=now_ns)
    _begun_ns: int = field(default_factory=time.monotonic_ns)
    """`start_ns` by a clock that nobody sets."""
    first_token_ns: int | None = None
    """Time from `start_ns` to the first token, in nanoseconds."""
    http_status: int | None = None
    error_type: str | None = None
    error_message: str = ""
    drifted: Drifted | None = None
    prefix: str | None = None
    """`exact`, or the reason for which the prompt was not built from sampled tokens."""
    canary: Mapping[str, AttributeValue] = field(default_factory=dict)
    """Attributes of a call of a canary."""
    media: dict[str, bytes] = field(default_factory=dict)
    """Attributes with the bytes of the request's media that are not known to be stored for the rollout."""

    def check(self) -> None:
        """Raises ApiError for a request that could not be recorded, before anything is sampled for it.

        Numbers may be too large for a span, and text may not be Unicode.
        """
        for name, value in self._attributes().items():
            if isinstance(value, int) and not -(2**63) <= value < 2**63:
                raise _not_recordable(f"{name} is {value}, and a span holds 64 bits")
            if isinstance(value, str) and not value.isascii() and value.encode(errors="replace").decode() != value:
                raise _not_recordable(f"{name} is not Unicode: {value!r}")

    def add(self, part: Json, *, is_whole: bool) -> None:
        """Capture a whole response or the next chunk. Raises ApiError for an error of the engine in place of either."""
        if error := error_in(part):
            raise error
        self.capture.add_whole(part) if is_whole else self.capture.add(part)
        if self.first_token_ns is None and self.capture.has_tokens:
            self.first_token_ns = self._elapsed_ns()

    def _elapsed_ns(self) -> int:
        return time.monotonic_ns() - self._begun_ns

    def fail(self, error_type: str, message: str) -> None:
        self.error_type, self.error_message = error_type, message

    def spans(self, content_max_bytes: int) -> list[Span]:
        """A span for each choice, which ends now; without a choice one span. All share parent and response id.

        Media in the request become references. The first span has the bytes that are not known to be stored.
        """
        trace_id = self.caller.trace_id or f"{random.getrandbits(128):032x}"
        shared: Mapping[str, AttributeValue] = self._attributes()
        if len(self.client_body) >= MIN_CHARACTERS:
            within = self.caller.project, self.caller.rollout_id or trace_id
            shared, new = referenced(shared, lambda: within, content_max_bytes)
            self.media = new
        choices = self.capture.choices()
        spans = [
            self._span(trace_id, {**shared, **_choice_attributes(choice, self.capture.usage, choices)})
            for choice in choices
        ] or [self._span(trace_id, shared)]
        spans[0] = replace(spans[0], attributes={**spans[0].attributes, **self.media})
        return spans

    def note_committed(self) -> None:
        """The media need not be sent again for the rollout."""
        within = self.caller.rollout_id or self.caller.trace_id
        note_stored(within and (self.caller.project, within), self.media)

    def _span(self, trace_id: str, attributes: Mapping[str, AttributeValue]) -> Span:
        return Span(
            trace_id=trace_id,
            span_id=f"{random.getrandbits(64):016x}",  # As OpenTelemetry does: no secret depends on it.
            parent_id=self.caller.parent_id,
            name=semconv.SPAN_GATEWAY_CALL,
            start_ns=self.start_ns,
            end_ns=self.start_ns + self._elapsed_ns(),
            attributes=attributes,
            status="error" if self.error_type else "ok",
            status_message=self.error_message,
            kind=_CLIENT_KIND,
            scope=_SCOPE,
        )

    def _attributes(self) -> dict[str, AttributeValue]:
        """Attributes that the spans of all choices share."""
        sent = self.sent
        attributes: dict[str, AttributeValue | None] = {
            semconv.GEN_AI_OPERATION_NAME: self.operation,
            semconv.GEN_AI_REQUEST_MODEL: self.model,
            semconv.GEN_AI_REQUEST_TEMPERATURE: _only(float, sent.get("temperature")),
            semconv.GEN_AI_REQUEST_MAX_TOKENS: _only(int, sent.get("max_completion_tokens") or sent.get("max_tokens")),
            semconv.GEN_AI_REQUEST_SEED: _only(int, sent.get("seed")),
            semconv.GEN_AI_RESPONSE_ID: self.capture.response_id,
            semconv.GEN_AI_RESPONSE_MODEL: self.capture.model,
            semconv.POLICY_VERSION: self._policy_version(),
            semconv.HTTP_RESPONSE_STATUS_CODE: self.http_status,
            semconv.ERROR_TYPE: self.error_type,
            semconv.GATEWAY_REQUEST: self.client_body,
            semconv.GATEWAY_UPSTREAM: self.engine.url if self.engine else None,
            semconv.GATEWAY_FIRST_TOKEN_NS: self.first_token_ns,
            semconv.GATEWAY_CHANGED: json.dumps(self.changed, separators=(",", ":")) if self.changed else None,
            semconv.GATEWAY_CONSTRAINTS: self.constraints or None,
            semconv.GATEWAY_SAMPLING: json.dumps(self.sampling, separators=(",", ":")) if self.sampling else None,
            semconv.GATEWAY_QUEUE_NS: self.queue_ns,
            semconv.GATEWAY_RETRIES: self.retries or None,
            semconv.GATEWAY_DRIFT: self.drifted.to_json() if self.drifted else None,
            semconv.GATEWAY_PREFIX: self.prefix,
            semconv.PROJECT: self.caller.project if self.caller.project != DEFAULT_PROJECT else None,
        }
        return (
            {name: value for name, value in attributes.items() if value is not None}
            | {**self.canary}
            | self.caller.attributes()
        )

    def _policy_version(self) -> str | None:
        """The version that answered, under the name of the role that was asked: several may share an adapter."""
        version = policy_version(self.capture.model)
        if version is None or self.capture.model != self.engine_model:
            return version
        return version_under(self.policy, version)


class CallMetrics:
    """Counts the calls of a gateway for Prometheus."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        by = {"labelnames": ("engine", "role"), "registry": self.registry}
        self._seconds = Histogram("agl_gateway_call_seconds", "Duration of model calls.", buckets=_BUCKETS_S, **by)
        self._calls = Counter(
            "agl_gateway_calls", "Model calls by HTTP status.", ("engine", "role", "status"), registry=self.registry
        )
        self._tokens = Counter("agl_gateway_tokens", "Tokens of model calls.", ("role", "kind"), registry=self.registry)
        self._roles: set[str] = set()

    def count(self, record: CallRecord, spans: Sequence[Span]) -> None:
        """Count a call that ended; its engine is the one that answered."""
        engine, role = record.engine.url if record.engine else "none", self._label(record)
        self._seconds.labels(engine, role).observe((spans[0].end_ns - spans[0].start_ns) / 1e9)
        self._calls.labels(engine, role, record.error_type or str(record.http_status)).inc()
        names = {"prompt": semconv.GEN_AI_USAGE_INPUT_TOKENS, "response": semconv.GEN_AI_USAGE_OUTPUT_TOKENS}
        for kind, name in names.items():
            self._tokens.labels(role, kind).inc(sum(span.number(name) or 0 for span in spans))

    def _label(self, record: CallRecord) -> str:
        """The role of the call; `other` for new ones after the first 100, which clients name as they like."""
        role = record.caller.role or record.policy.partition("@")[0] or "none"
        if role not in self._roles and len(self._roles) >= _MAX_ROLES:
            return "other"
        self._roles.add(role)
        return role


class Recorder:
    """Appends spans to `stores`, by project, in a thread, one batch at a time. Calls that end meanwhile share the next.

    For one event loop; `close` it at the end.
    """

    def __init__(self, stores: Mapping[str, Store | Intake]) -> None:
        self._stores = stores
        self._waiting: list[_PendingCall] = []
        self._writing: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, "agl-recorder")

    async def commit(self, rows: list[SpanRow], project: str) -> None:
        """Returns when `rows` are committed. If the caller is cancelled meanwhile they are committed all the same.

        Raises AglError if the store refuses them.
        """
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((project, rows, done))
        if self._writing is None:
            self._writing = asyncio.create_task(self._write())
        await done

    async def close(self) -> None:
        """Wait for the batches that are not committed yet."""
        if self._writing is not None:
            await self._writing
        self._thread.shutdown()

    async def _write(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting, []
            errors = await asyncio.get_running_loop().run_in_executor(self._thread, self._append, batch)
            for (*_, done), error in zip(batch, errors, strict=True):
                if not done.done():
                    done.set_result(None) if error is None else done.set_exception(error)
        self._writing = None

    def _append(self, batch: list[_PendingCall]) -> list[Exception | None]:
        """The error of each call, or None. If the batch fails, its calls are appended one by one."""
        of_project: dict[str, list[SpanRow]] = {}
        for project, rows, _ in batch:
            of_project.setdefault(project, []).extend(rows)
        try:
            for project, rows in of_project.items():
                self._stores[project].append_rows(rows)
        except Exception as error:  # noqa: BLE001 - handed to the callers; the next batch must be written
            return [error] if len(batch) == 1 else [self._append([one])[0] for one in batch]
        return [None] * len(batch)


def _not_recordable(reason: str) -> ApiError:
    return ApiError(400, "not_recordable", f"the call could not be recorded: {reason}")


def policy_version(model: str | None) -> str | None:
    """`<name>@<n>` from the engine's model name; version 0 for an engine without versions."""
    return model if model is None or "@" in model else f"{model}@0"


def version_under(policy: str, engine_model: str) -> str:
    """The version that the engine calls `engine_model`, under the name of `policy`."""
    return f"{policy.partition('@')[0]}@{(policy_version(engine_model) or '').partition('@')[2]}"


def _only(kind: type[int] | type[float], value: Any) -> AttributeValue | None:
    """`value` if it has type `kind` (an int counts as a float), else None: the engine refuses wrong types, not we."""
    accepted = (int, float) if kind is float else kind
    return kind(value) if isinstance(value, accepted) and not isinstance(value, bool) else None


def _choice_attributes(choice: Choice, usage: Json, of_all: Sequence[Choice]) -> dict[str, AttributeValue]:
    found: dict[str, AttributeValue] = {semconv.GATEWAY_CHOICE: choice.index}
    found[semconv.GEN_AI_OUTPUT_MESSAGES] = json.dumps([choice.message()])
    if choice.finish_reason:
        found[semconv.GEN_AI_RESPONSE_FINISH_REASONS] = [choice.finish_reason]
    return found | choice.token_attributes() | _usage_attributes(choice, usage, of_all)


def _usage_attributes(choice: Choice, usage: Json, of_all: Sequence[Choice]) -> dict[str, AttributeValue]:
    """Token counts of a choice as the engine stated them, else the number of its ids.

    The engine's count is the sum over all choices. If that is also the number of all ids, a choice has its own number.
    """
    counts: dict[str, AttributeValue] = {}
    if (prompt := _only(int, usage.get("prompt_tokens")) if len(of_all) == 1 else None) or choice.prompt_ids:
        counts[semconv.GEN_AI_USAGE_INPUT_TOKENS] = prompt or len(choice.prompt_ids)
    answer = _only(int, usage.get("completion_tokens"))
    if answer == sum(len(one.token_ids) for one in of_all):
        answer = len(choice.token_ids)
    if answer or choice.token_ids:
        counts[semconv.GEN_AI_USAGE_OUTPUT_TOKENS] = answer or len(choice.token_ids)
    return counts
