"""One call of a scorer, and what its result means: a reward, or a missing one with the reason."""

import inspect
import traceback
from collections.abc import Awaitable, Callable, Generator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

from agl import semconv
from agl.emit.reward import reward_attributes
from agl.errors import RewardError

Result = TypeVar("Result")
_NO_REASONS: Mapping[str, str] = MappingProxyType({})
_NO_WEIGHTS: Mapping[str, float] = MappingProxyType({})
_ARGUMENTS = 3


class ScoredRollout(Protocol):
    """What a scorer may know of the rollout."""

    @property
    def rollout_id(self) -> str: ...

    @property
    def group_id(self) -> str | None: ...

    @property
    def mode(self) -> str: ...


Scorer = Callable[..., Any] | Mapping[str, "Scorer"]


class Parts(dict[str, float | None]):
    """Parts of a reward, with the weights that a `Weighted` gave them, and why parts that are None are missing."""

    def __init__(
        self,
        parts: Mapping[str, float | None],
        weights: Mapping[str, float] | None = None,
        reasons: Mapping[str, str] = _NO_REASONS,
    ) -> None:
        super().__init__(parts)
        self.weights = weights
        self.reasons = reasons

    @classmethod
    def of(cls, result: Mapping[str, Any]) -> "Parts":
        return result if isinstance(result, Parts) else cls(result)

    def with_values(self, values: Mapping[str, float | None]) -> "Parts":
        """The same weights and reasons for other values."""
        return Parts(values, self.weights, self.reasons)


@dataclass(frozen=True, slots=True)
class Score:
    """A reward and its parts, or why there is none."""

    value: float | None = None
    parts: Mapping[str, float] = field(default_factory=dict)
    missing: str | None = None


def read_score(result: Any, weights: Mapping[str, float] = _NO_WEIGHTS) -> Score:
    """The score that the `result` of a scorer is under `weights`, those of the configuration.

    A part that is None makes the reward missing, unless its weight is 0. So does one that lacks although the scorer has
    a weight for it; the configuration may have weights for what others add, e.g. the judge. Raises TelemetryError for
    what is no reward, RewardError if both the scorer and the configuration weigh the parts.
    """
    if result is None:
        return Score(None, missing="the scorer returned None")
    if not isinstance(result, Mapping):
        return Score(float(reward_attributes(result)[semconv.REWARD_VALUE]))
    parts = Parts.of(result)
    if parts.weights is not None and weights:
        raise RewardError(
            f"the scorer weighs its parts ({', '.join(parts.weights)}), and so does `rewards` in the configuration; "
            "remove one of them"
        )
    used = parts.weights or weights
    needed = [name for name in {**(parts.weights or {}), **parts} if used.get(name, 0.0 if used else 1.0)]
    if absent := [name for name in needed if parts.get(name) is None]:
        reasons = (f"{name} ({parts.reasons.get(name, 'None')})" if name in parts else name for name in absent)
        return Score(None, missing=f"parts are missing: {', '.join(reasons)}")
    attributes = reward_attributes(parts, weights=used)
    value = float(attributes.pop(semconv.REWARD_VALUE))
    return Score(value, {name.removeprefix(semconv.REWARD_PREFIX): float(part) for name, part in attributes.items()})


def call_scorer(scorer: Scorer, task: Any, answer: Any, rollout: ScoredRollout | None) -> Any:
    """The result of `scorer`, or an awaitable of it. It gets as many of the arguments as it takes."""
    if isinstance(scorer, Mapping):
        return run_steps(_parts_steps(scorer, task, answer, rollout))
    arguments = (task, answer, rollout)
    return scorer(*arguments[: _number_of_arguments(scorer)])


def scored(scorer: Scorer, task: Any, answer: Any, rollout: ScoredRollout | None = None) -> Any:
    """`call_scorer` for tests and notebooks: awaits an async scorer."""
    import asyncio

    async def wait(result: Awaitable[Any]) -> Any:
        return await result

    result = call_scorer(scorer, task, answer, rollout)
    return asyncio.run(wait(result)) if inspect.isawaitable(result) else result


def run_steps(steps: Generator[Any, Any, Result]) -> Result | Awaitable[Result]:
    """Run `steps`, which yields results of scorers and is sent their values.

    The result is an awaitable only if one of them is, so that combinators of sync scorers are sync.
    """
    try:
        result = next(steps)
        while not inspect.isawaitable(result):
            result = steps.send(result)
    except StopIteration as end:
        return end.value
    return _run_async(steps, result)


def describe_error(error: BaseException) -> str:
    """Type and message of `error`."""
    return traceback.format_exception_only(error)[-1].strip()


async def _run_async(steps: Generator[Any, Any, Result], result: Any) -> Result:
    try:
        while True:
            if not inspect.isawaitable(result):
                result = steps.send(result)
                continue
            try:
                value = await result
            except Exception as error:  # noqa: BLE001 - the step decides what an error of a scorer means
                result = steps.throw(error)
            else:
                result = steps.send(value)
    except StopIteration as end:
        return end.value


def _parts_steps(
    scorers: Mapping[str, Scorer], task: Any, answer: Any, rollout: ScoredRollout | None
) -> Generator[Any, Any, Parts]:
    values: dict[str, float | None] = {}
    reasons: dict[str, str] = {}
    for name, scorer in scorers.items():
        try:
            score = read_score((yield call_scorer(scorer, task, answer, rollout)))
            values[name], reason = score.value, score.missing
        except Exception as error:  # noqa: BLE001 - any error of a part means that the part is missing
            values[name], reason = None, describe_error(error)
        if reason:
            reasons[name] = reason
    return Parts(values, reasons=reasons)


def _number_of_arguments(scorer: Callable[..., Any]) -> int:
    """How many of task, answer and rollout `scorer` takes by position."""
    try:
        parameters = inspect.signature(scorer).parameters.values()
    except (TypeError, ValueError):  # a builtin without a signature
        return _ARGUMENTS - 1
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        return _ARGUMENTS
    return min(_ARGUMENTS, sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters))
