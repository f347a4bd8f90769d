"""`engine`: the in-process engine, or vLLM, which the training may start itself."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, SecretStr, model_validator

from agl.config.section import Count, Positive, Section, TextPath


class LaunchConfig(Section):
    """A vLLM server that the training starts on this machine, and ends when it ends."""

    program: TextPath = "vllm"
    """The program `vllm`, which may be in an environment of its own."""
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """On 127.0.0.1; 0: any free port."""
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

    kind: Literal["local", "vllm"] = "local"
    """`vllm`: training pushes its adapters to the vLLM servers in `gateway`, or to the one that it launches."""
    launch: LaunchConfig | None = None
    max_batch: Count = 64
    """Largest number of sequences that the in-process engine decodes together."""
    max_model_len: Count = 2048
    """Longest prompt plus response, in tokens."""
    tolerance: Positive = 0.05
    """Adapters are proved on vLLM only if its logprobs of the base model differ from the trainer's by at most this, in
    nats per token on average."""

    @model_validator(mode="before")
    @classmethod
    def _name_kind(cls, data: Any) -> Any:
        return {"kind": data} if isinstance(data, str) else data

    @model_validator(mode="after")
    def _launches_vllm(self) -> Self:
        if self.launch is not None and self.kind != "vllm":
            raise ValueError("launch starts vLLM, but kind is local: set kind: vllm, or remove launch")
        return self
