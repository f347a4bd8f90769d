"""`engine`: the in-process engine, or vLLM."""

from typing import Any, Literal

from pydantic import model_validator

from agl.config.section import Count, Positive, Section


class EngineConfig(Section):
    """What samples: the in-process engine, or vLLM. `engine: vllm` stands for `engine: {kind: vllm}`."""

    kind: Literal["local", "vllm"] = "local"
    """`vllm`: a training pushes its adapters to the servers that `gateway` names."""
    max_batch: Count = 64
    """Sequences that the in-process engine decodes together."""
    max_model_len: Count = 2048
    """Longest prompt plus answer, in tokens."""
    tolerance: Positive = 0.05
    """Largest mean difference between the logprobs of vLLM and the trainer at which an adapter counts as live, in nats
    a token."""

    @model_validator(mode="before")
    @classmethod
    def _name_kind(cls, data: Any) -> Any:
        return {"kind": data} if isinstance(data, str) else data
