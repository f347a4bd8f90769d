"""The tokens of a call: the text of each, its logprob, and what training did with it."""

from dataclasses import dataclass
from typing import Final

from agl.inspection.report import TRAINED, CallReport
from agl.inspection.token_text import token_texts, tokenizer_in

_CONTEXT: Final = 300
"""Prompt tokens that are shown before the answer."""
_BEFORE_DRIFT: Final = 20
_BOUNDS: Final = (-0.01, -0.1, -0.7, -2.3, -4.6)
"""Logprobs between the shades: probabilities of 0.99, 0.9, 0.5, 0.1 and 0.01."""


@dataclass(frozen=True, slots=True)
class ShownToken:
    id: int
    text: str | None
    """None: the tokenizer is unknown."""
    is_response: bool
    logprob: float | None = None
    is_drifted: bool = False
    """The first token of the prompt that differs from what was sampled."""

    @property
    def shade(self) -> int:
        """0 for a likely token to 5 for an unlikely one."""
        return sum(self.logprob < bound for bound in _BOUNDS) if self.logprob is not None else 0


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
    for place, token in enumerate(response):
        shown.append(ShownToken(token, next(texts), True, logprobs[place] if place < len(logprobs) else None))
    return TokenView(report, mode, shown, first, tokenizer is not None, fault)
