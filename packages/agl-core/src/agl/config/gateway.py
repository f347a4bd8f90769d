"""`gateway`: the proxy in front of engines, the engines behind it, and its timeouts."""

import itertools
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from agl.config.section import Count, Positive, Section
from agl.config.tls import TlsConfig


class UpstreamConfig(Section):
    """An engine behind the gateway."""

    url: Annotated[str, Field(pattern=r"^https?://")]
    """Base URL of an OpenAI-compatible server (ending in `/v1`)."""
    kind: Literal["vllm", "sglang"] = "vllm"
    """How it is asked for token ids, and given them; `vllm` also for servers in the shape of vLLM."""
    key_env: str | None = None
    """Environment variable of its key; clients then show the engine none of theirs."""
    models: list[str] = Field(default_factory=list)
    """Roles, policies and models that it serves, in every version; empty: whatever it is asked for."""
    max_concurrent: Count = 256
    """Calls there at once; further ones wait, and rollouts take turns."""


class TimeoutsConfig(Section):
    """How long the gateway waits at each hop of a call."""

    connect_s: Positive = 10.0
    queue_s: Positive = 300.0
    """For a place at the engine."""
    first_byte_s: Positive = 300.0
    """Where the answer is not streamed, that is all of it."""
    chunk_s: Positive = 120.0
    """Between two pieces of a stream."""
    total_s: Positive = 1800.0
    """For all of it, from the call's arrival."""


RecordMode = Literal["closed", "open"]


class GatewayConfig(Section):
    """The OpenAI-compatible proxy in front of engines (`agl serve`, `agl train`)."""

    upstream: str = "local"
    """`local` for the in-process engine, else the base URL of an OpenAI-compatible server (ending in `/v1`)."""
    engines: list[UpstreamConfig] = Field(default_factory=list)
    """Several engines, or one that needs a key, in place of `upstream`."""
    models: dict[str, str] = Field(default_factory=dict)
    """Names that clients ask for, and what each stands for at the engines: a role, a policy or a pinned version."""
    extra_body: dict[str, Any] = Field(default_factory=dict)
    """Fields put into every request that the client did not set itself; engines are asked for token ids without it."""
    exact_prefix: bool = False
    """Make the prompt of a turn that continues a conversation of the tokens sampled so far, where the engine takes
    tokens; the chat template writes only what is new."""
    record: RecordMode = "closed"
    """What becomes of an answer that cannot be recorded: `closed` withholds it, `open` lets it pass and says so."""
    retries: Annotated[int, Field(ge=0)] = 2
    """Further tries of a call of which nothing was passed on yet."""
    backoff_s: Positive = 0.5
    """Pause before the first of them; each further one is twice as long."""
    hedge_after_s: Positive | None = None
    """Ask a second engine too when the first has been silent for so long."""
    health_s: Positive = 10.0
    """Time between two looks at the engines, where there are several."""
    timeouts: TimeoutsConfig = Field(default_factory=TimeoutsConfig)
    max_body_bytes: Count = 32 * 2**20
    """Largest request."""
    tls: TlsConfig | None = None
    """Of the gateway's port; the receivers' is `collector.tls`."""

    @model_validator(mode="after")
    def _names_its_engines_once(self) -> Self:
        if self.engines and "upstream" in self.model_fields_set:
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
        is_left_out = self.extra_body.get("return_token_ids", True) is None
        if self.exact_prefix and is_left_out and not any(engine.kind == "sglang" for engine in self.engines):
            raise ValueError("exact_prefix needs the token ids that return_token_ids: null in extra_body leaves out")
        return self
