"""What kind of drift it is, from how an answer was worded and how the next prompt words it."""

from collections.abc import Callable

from agl.gateway.history import Said
from agl.tokens.drift import Drift

_THOUGHT_END = "</think>"


def kind_of_drift(given: Said, sent_back: Said, texts: tuple[str, str, str] | None) -> Drift:
    """The kind of drift of an answer that was `given` and `sent_back` with the same meaning.

    `texts` are what was sampled and what the prompt has from the first other token on, and the text of the token that
    ended the answer, empty where none did. None: the engine does not tell texts, and only the messages are compared.
    """
    if texts is None:
        return _by_messages(given, sent_back)
    sampled, there, end = texts
    if _turn_is(sampled, there, end, _all):
        return Drift.RETOKENIZED
    if _THOUGHT_END in sampled and _turn_is(sampled, there, end, _visible):
        return Drift.REASONING
    # Where the rest has the name of the call still before it, the difference lies before the call.
    in_call = bool(given.calls) and given.calls[0][0] not in sampled
    if not in_call and _turn_is(sampled, there, end, _blankless):
        return Drift.WHITESPACE
    return Drift.ARGUMENTS if given.calls else Drift.REWRITTEN


def _by_messages(given: Said, sent_back: Said) -> Drift:
    if given.has_thoughts and not sent_back.has_thoughts:
        return Drift.REASONING
    if given.calls != sent_back.calls:
        return Drift.ARGUMENTS
    return Drift.RETOKENIZED if given.text == sent_back.text else Drift.WHITESPACE


def _turn_is(sampled: str, there: str, end: str, seen: Callable[[str], str]) -> bool:
    """Whether the turn in which both begin is the same, as `seen`. One that was cut short goes on with the template."""
    if end:
        return seen(sampled.partition(end)[0]) == seen(there.partition(end)[0])
    return seen(there).startswith(seen(sampled))


def _all(text: str) -> str:
    return text


def _visible(text: str) -> str:
    return text.rpartition(_THOUGHT_END)[2].strip()


def _blankless(text: str) -> str:
    return "".join(text.split())
