"""`gateway`: the proxy in front of the engines, the engines, and the timeouts."""

import itertools
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from agl.config.endpoint import EndpointConfig
from agl.config.section import Count, Positive, Section
from agl.config.tls import TlsConfig
from agl.secret_url import SecretUrl


class UpstreamConfig(EndpointConfig):
    """An engine behind the gateway."""

    kind: Literal["vllm", "sglang", "agl"] = "vllm"
    """Its API for token ids and sampling; `vllm` also for servers with the same API, `agl` for the engine of agl."""
    models: list[str] = Field(default_factory=list)
    """Roles, policies and models that it serves, in all versions; empty: all."""
    max_concurrent: Count = 256
    """Limit on concurrent calls. Further calls wait, with the rollouts taking turns."""


class TimeoutsConfig(Section):
    """Time limits for each stage of a call."""

    connect_s: Positive = 10.0
    """To connect to the engine."""
    queue_s: Positive = 300.0
    """Until the engine has fewer than `max_concurrent` calls."""
    first_byte_s: Positive = 300.0
    """Until the first byte of the response; without streaming, until the whole response."""
    chunk_s: Positive = 120.0
    """Between two chunks of a stream."""
    total_s: Positive = 1800.0
    """For the whole call, from its arrival."""
    send_s: Positive = 60.0
    """For a client that reads a response, if it is long, at less than 64 KiB/s; then its connection is closed."""


RecordMode = Literal["closed", "open"]


class GatewayConfig(Section):
    """The OpenAI-compatible proxy in front of the engines (`agl serve`, `agl train`)."""

    upstream: SecretUrl = SecretUrl("local")
    """`local` for the in-process engine, which a training needs, else the base URL of an OpenAI-compatible server
    (ending in `/v1`)."""
    engines: list[UpstreamConfig] = Field(default_factory=list)
    """Engines in place of `upstream`, if there are several or if one needs a key."""
    models: dict[str, str] = Field(default_factory=dict)
    """Aliases: `model` of a client's request to `model` at the engine, a role, a policy or a pinned version."""
    extra_body: dict[str, Any] = Field(default_factory=dict)
    """Fields to add to each request unless the client set them. Token ids are requested from engines in any case."""
    exact_prefix: bool = False
    """Build the prompt of a continued conversation from the tokens sampled so far, if the engine accepts token ids; the
    chat template renders the new messages only."""
    content_max_bytes: Count = 1 << 20
    """Longer texts in a recorded request are cut in the record. Media become references in any case."""
    record: RecordMode = "closed"
    """If a response cannot be recorded, `closed` withholds it, and `open` passes it on with a warning."""
    retries: Annotated[int, Field(ge=0)] = 2
    """How often a failed call is retried, unless part of its response was passed on already."""
    backoff_s: Positive = 0.5
    """Pause before the first retry; it doubles for each further one."""
    hedge_after_s: Positive | None = None
    """Send the call to a second engine too if the first sends nothing for this long."""
    health_s: Positive = 10.0
    """Time between two health checks of the engines, if there are several."""
    timeouts: TimeoutsConfig = Field(default_factory=TimeoutsConfig)
    max_body_bytes: Count = 32 * 2**20
    """Largest request body."""
    max_pending_bytes: Count = 256 * 2**20
    """Limit on the bodies of all calls that arrive or are under way; above it clients are asked to retry."""
    tls: TlsConfig | None = None
    """TLS of the gateway's port; the receivers have `collector.tls`."""

    @model_validator(mode="after")
    def _leaves_room(self) -> Self:
        if self.max_pending_bytes < 2 * self.max_body_bytes:
            raise ValueError("max_pending_bytes must be twice max_body_bytes: memory holds a body compressed and plain")
        return self

    @model_validator(mode="after")
    def _names_its_engines_once(self) -> Self:
        if self.engines and self.upstream != "local":
            raise ValueError("upstream and engines both name engines: list them all in engines")
        return self

    @model_validator(mode="after")
    def _asks_engines_of_one_model_alike(self) -> Self:
        for one, other in itertools.combinations(self.engines, 2):
            if one.kind != other.kind and (not one.models or not other.models or {*one.models} & {*other.models}):
                raise ValueError(f"{one.url} and {other.url} serve the same models, so both must be of one kind")
        return self

    @model_validator(mode="after")
    def _holds_the_tokens_it_needs(self) -> Self:
        is_off = self.extra_body.get("return_token_ids", True) is None
        if self.exact_prefix and is_off and not any(engine.kind == "sglang" for engine in self.engines):
            raise ValueError("exact_prefix needs the token ids that return_token_ids: null in extra_body switches off")
        return self
