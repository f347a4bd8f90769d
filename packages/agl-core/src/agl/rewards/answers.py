"""Scorers of short answers: exact, by a pattern, by a JSON schema, or a number within a tolerance. Each gives 0 or 1.

`gold` is the key of the task, or a function of it, with the expected value; `answer` that of the answer, None for all
of it. A task without the key makes the reward missing.
"""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import regex

from agl.errors import RewardError
from agl.rewards.combinators import find
from agl.rewards.score import ScoredRollout

Where = Callable[[Any], Any] | str | None
_NUMBER = regex.compile(r"(?:(?<!\d)[-+\u2212])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?")
_PATTERN_TIMEOUT_S: Final = 1.0


class Exact:
    """1 if the answer equals the expected value; texts without spaces around them, with `ignore_case` in any case."""

    def __init__(self, gold: Where = "answer", *, answer: Where = None, ignore_case: bool = False) -> None:
        self._gold, self._answer, self._ignore_case = gold, answer, ignore_case

    def __call__(self, task: Any, answer: Any, rollout: ScoredRollout | None = None) -> float:
        expected, found = find(task, self._gold, "task"), find(answer, self._answer, "answer")
        return float(self._plain(expected) == self._plain(found))

    def _plain(self, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        return value.strip().casefold() if self._ignore_case else value.strip()


class Matches:
    """1 if the regular expression `pattern` is found in the answer; `pattern` None: the task has it, as `gold` says.

    None has no match. A search that takes more than a second makes the reward missing.
    """

    def __init__(self, pattern: str | None = None, *, gold: Where = "pattern", answer: Where = None) -> None:
        """Raises RewardError for an invalid pattern."""
        self._pattern = None if pattern is None else _compiled(pattern)
        self._gold, self._answer = gold, answer

    def __call__(self, task: Any, answer: Any, rollout: ScoredRollout | None = None) -> float:
        pattern = self._pattern or _compiled(find(task, self._gold, "task"))
        found = find(answer, self._answer, "answer")
        return float(found is not None and pattern.search(str(found), timeout=_PATTERN_TIMEOUT_S) is not None)


class Number:
    """1 if the last number in the answer is within a tolerance of the expected one: `relative` of it, or `absolute`."""

    def __init__(
        self, gold: Where = "answer", *, answer: Where = None, relative: float = 1e-6, absolute: float = 1e-9
    ) -> None:
        self._gold, self._answer, self._relative, self._absolute = gold, answer, relative, absolute

    def __call__(self, task: Any, answer: Any, rollout: ScoredRollout | None = None) -> float:
        expected = _last_number(find(task, self._gold, "task"))
        if expected is None:
            raise RewardError(f"the task has {find(task, self._gold, 'task')!r}, expected a number")
        found = _last_number(find(answer, self._answer, "answer"))
        if found is None:
            return 0.0
        return float(math.isclose(found, expected, rel_tol=self._relative, abs_tol=self._absolute))


class JsonSchema:
    """1 if the answer, a JSON value or its text, is valid under `schema`; None: the task has it, as `gold` says.

    References to other documents are not fetched: they make the reward missing. Needs `agl-core[rewards]`.
    """

    def __init__(
        self, schema: Mapping[str, Any] | None = None, *, gold: Where = "schema", answer: Where = None
    ) -> None:
        """Raises RewardError for an invalid schema, or if jsonschema is not installed."""
        try:
            import jsonschema.validators
            import jsonschema_specifications
        except ImportError as error:
            raise RewardError(f"JsonSchema needs jsonschema ({error}): pip install 'agl-core[rewards]'") from error
        self._library = jsonschema
        self._documents = jsonschema_specifications.REGISTRY
        self._validator = None if schema is None else self._checked(schema)
        self._gold, self._answer = gold, answer

    def __call__(self, task: Any, answer: Any, rollout: ScoredRollout | None = None) -> float:
        validator = self._validator or self._checked(find(task, self._gold, "task"))
        value = find(answer, self._answer, "answer")
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                return 0.0
        return float(validator.is_valid(value))

    def _checked(self, schema: Any) -> Any:
        validators = self._library.validators
        kind = validators.validator_for(schema, default=self._library.Draft202012Validator)
        try:
            kind.check_schema(schema)
        except self._library.SchemaError as error:
            raise RewardError(f"the JSON schema is invalid: {error.message}") from error
        return kind(schema, registry=self._documents)


def _compiled(pattern: Any) -> Any:
    try:
        return regex.compile(pattern)
    except (regex.error, TypeError) as error:
        raise RewardError(f"{pattern!r} is no regular expression: {error}") from error


def _last_number(value: Any) -> float | None:
    """A number, or the last one in a text: `1,234.5`, `-2e3`; None if there is none. `5-10` ends with 10, not -10."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    found = _NUMBER.findall(value) if isinstance(value, str) else []
    return float(found[-1].replace(",", "").replace("\u2212", "-")) if found else None
