"""`engine`: the in-process engine, or vLLM."""

from typing import Any, Literal

from pydantic import model_validator

from agl.config.section import Count, Positive, Section


class EngineConfig(Section):
    """The engine that samples: in this process, or vLLM. `engine: vllm` is short for `engine: {kind: vllm}`."""

    kind: Literal["local", "vllm"] = "local"
    """`vllm`: training pushes its adapters to the vLLM servers in `gateway`."""
    max_batch: Count = 64
    """Largest number of sequences that the in-process engine decodes together."""
    max_model_len: Count = 2048
    """Longest prompt plus response, in tokens."""
    tolerance: Positive = 0.05
    """An adapter on vLLM is accepted as live if its logprobs differ from the trainer's by at most this, in nats per
    token on average."""

    @model_validator(mode="before")
    @classmethod
    def _name_kind(cls, data: Any) -> Any:
        return {"kind": data} if isinstance(data, str) else data
