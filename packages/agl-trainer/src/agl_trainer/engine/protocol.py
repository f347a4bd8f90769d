"""Interface between the HTTP layer and the sampling loop: parameters, sampled tokens and errors."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from agl.errors import AglError

FinishReason = Literal["stop", "length"]


class EngineError(AglError):
    """Sampling is not possible, or has failed."""


class UnknownModelError(EngineError):
    """A request names a model, role or version that this engine does not serve."""


class PromptError(EngineError):
    """A prompt has no tokens, or one that the model does not know."""


class ContextLengthError(EngineError):
    """Prompt and requested answer together exceed the engine's `max_model_len`."""


class EngineStoppedError(EngineError):
    """The engine has stopped or is shutting down; a retry, later or at another engine, may succeed."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample one sequence.

    `temperature` 0 is greedy. `top_k` 0 is no limit. `seed` None draws a random seed. `top_logprobs` is the number of
    alternatives reported with each token. `deliver_at_end`: hand over all tokens together after the last one, so that
    the caller's event loop wakes up once.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: frozenset[int] = frozenset()
    top_logprobs: int = 0
    deliver_at_end: bool = False


@dataclass(frozen=True, slots=True)
class SampledToken:
    """One token, its logprob in the distribution that it was sampled from, and the likeliest alternatives likewise."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """As (token id, logprob)."""


class Generation(Protocol):
    """Handle of one sequence that is being sampled."""

    @property
    def version(self) -> str:
        """The policy version that samples, as `<role-or-model>@<n>`."""
        ...

    @property
    def finish_reason(self) -> FinishReason | None:
        """`stop` after a stop token (the last one yielded), `length` at max_tokens, None while running or cancelled."""
        ...

    def cancel(self) -> None:
        """Stop sampling, which ends the iteration. Thread-safe; may be called repeatedly and after the end."""
        ...

    def __aiter__(self) -> AsyncIterator[SampledToken]:
        """Tokens as they are sampled; to be iterated once. Raises EngineError if sampling fails."""
        ...


class Sampler(Protocol):
    """Samples tokens: the engine's scheduler, or a scripted sampler in tests."""

    def submit(self, prompt_ids: Sequence[int], model: str, params: SamplingParams) -> Generation:
        """Queue one sequence; thread-safe, does not block. `model` is a role, a pinned version or the base model.

        Raises UnknownModelError, PromptError, ContextLengthError, EngineStoppedError.
        """
        ...

    def models(self) -> list[str]:
        """Every name that `submit` currently accepts."""
        ...
