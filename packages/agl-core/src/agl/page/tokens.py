"""The tokens of a call: the text of each, its logprob, and what training did with it."""

import math
from dataclasses import dataclass
from typing import Final

from agl.inspection.report import TRAINED, CallReport
from agl.inspection.token_text import token_texts, tokenizer_in

_CONTEXT: Final = 300
"""Prompt tokens that are shown before the answer."""
_BEFORE_DRIFT: Final = 20
_BOUNDS: Final = (-0.01, -0.1, -0.7, -2.3, -4.6)
"""Logprobs between the shades: probabilities of 0.99, 0.9, 0.5, 0.1 and 0.01."""

_MOVED: Final = 0.2
"""Distance of a ratio from 1 that is shown: the usual clip."""


@dataclass(frozen=True, slots=True)
class ShownToken:
    id: int
    text: str | None
    """None: the tokenizer is unknown."""
    is_response: bool
    logprob: float | None = None
    ratio: float | None = None
    """Importance ratio in the last step that trained it."""
    is_drifted: bool = False
    """The first token of the prompt that differs from what was sampled."""

    @property
    def shade(self) -> int:
        """0 for a likely token to 5 for an unlikely one."""
        return sum(self.logprob < bound for bound in _BOUNDS) if self.logprob is not None else 0

    @property
    def probability(self) -> float | None:
        return None if self.logprob is None else math.exp(min(self.logprob, 0.0))

    @property
    def moved(self) -> str:
        """`more` or `less` likely than when it was sampled, if by more than `_MOVED`; else empty."""
        change = (self.ratio or 1.0) - 1
        return "" if abs(change) <= _MOVED else "more" if change > 0 else "less"


@dataclass(frozen=True, slots=True)
class TokenView:
    """The last tokens of a call's prompt and all of its answer."""

    report: CallReport
    mode: str
    """The rollout's."""
    tokens: list[ShownToken]
    left_out: int
    """Prompt tokens before the first that is shown."""
    has_texts: bool
    fault: str | None
    """Why there are no tokens, or no texts."""

    @property
    def is_trained(self) -> bool:
        return self.report.outcome == TRAINED

    @property
    def advantage(self) -> float | None:
        return self.report.trained[-1].advantage if self.report.trained else None

    @property
    def answer(self) -> list[ShownToken]:
        return [token for token in self.tokens if token.is_response]

    @property
    def has_ratios(self) -> bool:
        return any(token.ratio is not None for token in self.answer)


def view_tokens(report: CallReport, mode: str, folder: str | None) -> TokenView:
    """`folder` is that of the run whose tokenizer has the texts."""
    call = report.call
    if call.malformed or call.packed_prompt is None or call.packed_response is None:
        return TokenView(report, mode, [], 0, False, call.malformed or "no token ids were recorded")
    prompt, response = call.prompt_ids or [], call.response_ids or []
    drift = report.turn.difference.position if report.turn and report.turn.difference else None
    first = max(len(prompt) - _CONTEXT, 0)
    if drift is not None:
        first = min(first, max(drift - _BEFORE_DRIFT, 0))
    tokenizer, fault = tokenizer_in(folder, call.role)
    texts = iter(token_texts(tokenizer, prompt[first:] + response))
    logprobs = call.logprobs or []
    shown = [
        ShownToken(token, next(texts), False, is_drifted=place == drift)
        for place, token in enumerate(prompt[first:], first)
    ]
    last = report.trained[-1] if report.trained else None
    for place, token in enumerate(response):
        logprob = logprobs[place] if place < len(logprobs) else None
        shown.append(ShownToken(token, next(texts), True, logprob, last.ratio_of(place) if last else None))
    return TokenView(report, mode, shown, first, tokenizer is not None, fault)
