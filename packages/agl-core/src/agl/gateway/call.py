"""A call as spans: one for each choice, the first of them the call's own."""

import json
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from agl import semconv
from agl.gateway.dispatch import Trip
from agl.gateway.identity import Caller
from agl.server.api_error import error_message
from agl.span import AttributeValue, Span
from agl.tokens.capture import Capture, Choice, Json
from agl.tokens.drift import Drifted

_CLIENT_KIND = 3
_SCOPE = "agl.gateway"


@dataclass(slots=True)
class Call:
    """One model request while it is under way: who makes it, what is sent, what has come back."""

    caller: Caller
    operation: str
    client_body: str
    """The JSON text as the client sent it."""
    sent: Json
    """The request as the engine gets it."""
    trip: Trip
    model: str | None = None
    """As the client asked for it."""
    changed: Json = field(default_factory=dict)
    """Fields in which `sent` differs from the client's request; None: left out."""
    project: str | None = None
    """Of the client's token."""
    start_ns: int = field(default_factory=time.time_ns)
    capture: Capture = field(default_factory=Capture)
    first_token_ns: int | None = None
    http_status: int | None = None
    error_type: str | None = None
    error_message: str = ""
    drifted: Drifted | None = None
    prefix: str | None = None
    """`exact`, or why a prompt that should be made of tokens is not."""

    @property
    def upstream(self) -> str | None:
        """URL of the engine that answers."""
        return self.trip.engine.url if self.trip.engine else None

    def answer(self, part: Json) -> None:
        """Take in what the engine answers, whole or chunk by chunk."""
        self.capture.add(part)
        if self.first_token_ns is None and self.capture.has_tokens:
            self.first_token_ns = time.time_ns() - self.start_ns
        if error := part.get("error"):
            self.fail("engine_error", error_message(error))

    def fail(self, error_type: str, message: str) -> None:
        self.error_type, self.error_message = error_type, message

    def spans(self) -> list[Span]:
        """The call, ended now. Choices after the first stand beside it with the same parent and response id."""
        trace_id = self.caller.trace_id or f"{random.getrandbits(128):032x}"
        shared = self._attributes()
        choices = self.capture.choices()
        of_choices = [shared | _choice_attributes(choice, self.capture.usage, len(choices)) for choice in choices]
        return [self._span(trace_id, attributes) for attributes in of_choices or [shared]]

    def _span(self, trace_id: str, attributes: Mapping[str, AttributeValue]) -> Span:
        return Span(
            trace_id=trace_id,
            span_id=f"{random.getrandbits(64):016x}",  # As OpenTelemetry's own: nobody gains from guessing one.
            parent_id=self.caller.parent_id,
            name=semconv.SPAN_GATEWAY_CALL,
            start_ns=self.start_ns,
            end_ns=time.time_ns(),
            attributes=attributes,
            status="error" if self.error_type else "ok",
            status_message=self.error_message,
            kind=_CLIENT_KIND,
            scope=_SCOPE,
        )

    def _attributes(self) -> dict[str, AttributeValue]:
        """What the spans of all choices share."""
        sent, trip = self.sent, self.trip
        named: dict[str, AttributeValue | None] = {
            semconv.GEN_AI_OPERATION_NAME: self.operation,
            semconv.GEN_AI_REQUEST_MODEL: self.model,
            semconv.GEN_AI_REQUEST_TEMPERATURE: _only(float, sent.get("temperature")),
            semconv.GEN_AI_REQUEST_MAX_TOKENS: _only(int, sent.get("max_completion_tokens") or sent.get("max_tokens")),
            semconv.GEN_AI_REQUEST_SEED: _only(int, sent.get("seed")),
            semconv.GEN_AI_RESPONSE_ID: self.capture.response_id,
            semconv.GEN_AI_RESPONSE_MODEL: self.capture.model,
            semconv.POLICY_VERSION: policy_version(self.capture.model),
            semconv.HTTP_RESPONSE_STATUS_CODE: self.http_status,
            semconv.ERROR_TYPE: self.error_type,
            semconv.GATEWAY_REQUEST: self.client_body,
            semconv.GATEWAY_UPSTREAM: self.upstream,
            semconv.GATEWAY_FIRST_TOKEN_NS: self.first_token_ns,
            semconv.GATEWAY_CHANGED: json.dumps(self.changed, separators=(",", ":")) if self.changed else None,
            semconv.GATEWAY_QUEUE_NS: trip.queue_ns,
            semconv.GATEWAY_RETRIES: trip.retries or None,
            semconv.GATEWAY_DRIFT: self.drifted.to_json() if self.drifted else None,
            semconv.GATEWAY_PREFIX: self.prefix,
            semconv.PROJECT: self.project,
        }
        return {name: value for name, value in named.items() if value is not None} | self.caller.attributes()


def policy_version(model: str | None) -> str | None:
    """`<name>@<n>` as the engine names it; an engine that does not count versions serves version 0."""
    return model if model is None or "@" in model else f"{model}@0"


def _only(kind: type[str] | type[int] | type[float], value: Any) -> AttributeValue | None:
    """`value` if it is of `kind` (an int is a float too): a client may send anything, the engine refuses it."""
    accepted = (int, float) if kind is float else kind
    return kind(value) if isinstance(value, accepted) and not isinstance(value, bool) else None


def _choice_attributes(choice: Choice, usage: Json, choices: int) -> dict[str, AttributeValue]:
    attributes: dict[str, AttributeValue] = {
        semconv.GATEWAY_CHOICE: choice.index,
        semconv.GEN_AI_OUTPUT_MESSAGES: json.dumps([choice.message()]),
    }
    if choice.finish_reason:
        attributes[semconv.GEN_AI_RESPONSE_FINISH_REASONS] = [choice.finish_reason]
    return attributes | choice.token_attributes() | _usage_attributes(choice, usage, choices)


def _usage_attributes(choice: Choice, usage: Json, choices: int) -> dict[str, AttributeValue]:
    """Tokens of this choice: counted where ids came, else the engine's sum where that is of this choice alone."""
    of_call = usage if choices == 1 else {}
    counted = {
        semconv.GEN_AI_USAGE_INPUT_TOKENS: len(choice.prompt_ids) or of_call.get("prompt_tokens"),
        semconv.GEN_AI_USAGE_OUTPUT_TOKENS: len(choice.token_ids) or of_call.get("completion_tokens"),
    }
    return {name: value for name, value in counted.items() if value is not None}
