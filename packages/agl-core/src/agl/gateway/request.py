"""What the gateway sends to the engine: the client's request, what capture needs, and what the mode forces."""

import hashlib
import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from agl import semconv
from agl.tokens.capture import Json, RequestedFields

_ALIASES = {"max_tokens": "max_completion_tokens", "max_completion_tokens": "max_tokens"}
"""Two names of the OpenAI API for one setting."""
_REPETITION = re.compile(r"~\d+")
_ATTEMPTS_REMEMBERED = 65_536


def prepare(
    body: Json,
    operation: str,
    *,
    ids: Mapping[str, Any],
    extra_body: Mapping[str, Any],
    forced: Mapping[str, Any],
    seed: int | None,
) -> Json:
    """The request for the engine. `ids` are the fields by which it is asked for token ids.

    `extra_body` is added where the client set nothing; a None in it leaves a field out that capture would add, for
    engines that refuse the field. `forced` is set whatever the client said. `seed` is used where nobody names one.
    """
    asked = RequestedFields.read(body, operation)
    capture = {**ids, "logprobs": True if operation == semconv.OPERATION_CHAT else 1}
    asked_for = {"logprobs": asked.logprobs} | {name: bool(body.get(name)) for name in ids}
    sent = dict(body)
    for name, value in (capture | {"seed": seed} | dict(extra_body)).items():
        if value is not None and not asked_for.get(name, _sets(body, name)):
            sent[name] = value
    for name, value in forced.items():
        sent.pop(_ALIASES.get(name, name), None)
        sent[name] = value
    return sent


def changes(body: Json, sent: Json) -> Json:
    """The fields in which the engine's request differs from `body`; None for those left out."""
    return {name: sent.get(name) for name in (*sent, *(body.keys() - sent)) if sent.get(name) != body.get(name)}


def _sets(body: Json, name: str) -> bool:
    return body.get(name) is not None or body.get(_ALIASES.get(name, name)) is not None


class Seeds:
    """Seeds of the calls of each attempt: the same attempt, run again, gets the same seeds in the same order.

    `~n` in an id marks a repetition (a resumed training repeats the step that was cut short), which samples the same.
    """

    def __init__(self) -> None:
        self._calls: OrderedDict[tuple[str, str], int] = OrderedDict()

    def next(self, rollout_id: str, attempt_id: str) -> int:
        """Seed of the attempt's next call: 31 bits of a hash of rollout, attempt and the call's index."""
        key = (rollout_id, attempt_id)
        index = self._calls.pop(key, 0)
        self._calls[key] = index + 1
        if len(self._calls) > _ATTEMPTS_REMEMBERED:
            self._calls.popitem(last=False)
        name = _REPETITION.sub("", f"{rollout_id}\0{attempt_id}\0{index}")
        digest = hashlib.blake2b(name.encode(), digest_size=4).digest()
        return int.from_bytes(digest, "big") >> 1
