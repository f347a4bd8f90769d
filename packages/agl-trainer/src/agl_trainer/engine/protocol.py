"""The seam between the HTTP layer and the sampling loop: what is asked for, what comes back, what can be refused."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from agl.errors import AglError

FinishReason = Literal["stop", "length"]


class EngineError(AglError):
    """The engine cannot sample, or failed while it did."""


class UnknownModelError(EngineError):
    """A request names a model, role or version that this engine does not hold."""


class ContextLengthError(EngineError):
    """A prompt, with the answer asked for, is longer than the engine's `max_model_len`."""


class EngineStoppedError(EngineError):
    """The engine is shutting down or has stopped; the same request may succeed elsewhere or later."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample one sequence.

    `temperature` 0 is greedy. `seed` None samples from fresh randomness. `top_logprobs` is the number of
    alternatives to report with each token. `at_once`: the caller has no use for a token before the last, and gets all
    with it, which leaves it asleep meanwhile.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop_token_ids: frozenset[int] = frozenset()
    top_logprobs: int = 0
    at_once: bool = False


@dataclass(frozen=True, slots=True)
class SampledToken:
    """One token, its logprob as sampled, and the most likely alternatives as (token id, logprob)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Generation(Protocol):
    """Handle on one sequence being sampled."""

    @property
    def version(self) -> str:
        """The policy that answers, as `<role-or-model>@<n>`."""
        ...

    @property
    def finish_reason(self) -> FinishReason | None:
        """`stop` after a stop token (the last one yielded), `length` at max_tokens, None while running or cancelled."""
        ...

    def cancel(self) -> None:
        """Stop sampling; iteration ends. Safe from any thread, more than once, and after the end."""
        ...

    def __aiter__(self) -> AsyncIterator[SampledToken]:
        """Tokens as they are sampled, once. Raises EngineError when sampling fails."""
        ...


class Sampler(Protocol):
    """What samples tokens: the engine's scheduler, or a script in a test."""

    def submit(self, prompt_ids: Sequence[int], model: str, params: SamplingParams) -> Generation:
        """Queue one sequence; thread-safe, does not block. `model`: a role, a pinned version or the base model.

        Raises UnknownModelError, ContextLengthError, EngineStoppedError.
        """
        ...

    def models(self) -> list[str]:
        """Every name that `submit` accepts now."""
        ...
