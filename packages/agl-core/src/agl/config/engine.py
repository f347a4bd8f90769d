"""`engine`: the in-process engine, or vLLM, which the training or `agl engine` may start."""

import os
from typing import Annotated, Any, Literal, Self

from pydantic import Field, SecretStr, model_validator

from agl.config.section import Count, Positive, Section, TextPath
from agl.errors import ConfigError


class LaunchConfig(Section):
    """A vLLM server that the training starts on this machine, and ends when it ends. With `kind: remote`, `agl engine`
    starts it on the machine where that runs."""

    program: TextPath = "vllm"
    """The program `vllm`, which may be in an environment of its own."""
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """On 127.0.0.1, or `--host` of `agl engine`; 0: any free port."""
    dtype: str = "auto"
    """Of the weights, as `vllm serve --dtype`."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.45
    """Share of the GPU's memory for vLLM; the rest is for the trainer, unless it has another GPU."""
    sleep: bool = False
    """Weights leave the GPU, and the KV cache is dropped, while the training updates the policy."""
    options: list[str] = Field(default_factory=list)
    """More options of `vllm serve`."""
    environment: dict[str, SecretStr] = Field(default_factory=dict)
    """More environment variables, e.g. `CUDA_VISIBLE_DEVICES`. No output shows their values, which may be tokens."""
    timeout_s: Positive = 1800.0
    """Longest time until it answers."""


class EngineConfig(Section):
    """The engine that samples: in this process, or vLLM. `engine: vllm` is short for `engine: {kind: vllm}`."""

    kind: Literal["local", "vllm", "remote"] = "local"
    """`vllm`: training pushes its adapters to the vLLM servers in `gateway`, or to the one that it launches. `remote`:
    vLLM servers on other machines, beside each of which `agl engine` fetches the adapters from the store."""
    launch: LaunchConfig | None = None
    lease_s: Positive = 10.0
    """With `kind: remote`, an engine that has not reported for so long is not used any more."""
    key_env: str | None = None
    """With `kind: remote`, environment variable of the API key of the engines, here and beside them. Needed if others
    can reach them."""
    max_batch: Count = 64
    """Largest number of sequences that the in-process engine decodes together."""
    max_model_len: Count = 2048
    """Longest prompt plus response, in tokens."""
    tolerance: Positive = 0.05
    """Adapters are proved on vLLM only if its logprobs of the base model differ from the trainer's by at most this, in
    nats per token on average."""

    def key(self) -> str:
        """The API key of the engines; empty if they have none. Raises ConfigError if the environment has no such."""
        if self.key_env is None:
            return ""
        if key := os.environ.get(self.key_env, "").strip():
            return key
        raise ConfigError(f"the environment has no {self.key_env}, which engine.key_env names")

    @model_validator(mode="before")
    @classmethod
    def _name_kind(cls, data: Any) -> Any:
        return {"kind": data} if isinstance(data, str) else data

    @model_validator(mode="after")
    def _launches_vllm(self) -> Self:
        if self.launch is not None and self.kind == "local":
            raise ValueError("launch starts vLLM, but kind is local: set kind: vllm, or remove launch")
        if self.launch is not None and self.launch.sleep and self.kind == "remote":
            raise ValueError("launch.sleep frees the GPU for the training, which kind: remote has on another machine")
        if self.key_env is not None and self.kind != "remote":
            raise ValueError("key_env is for kind: remote; other engines have theirs in gateway.engines")
        return self
