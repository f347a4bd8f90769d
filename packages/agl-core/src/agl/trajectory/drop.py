"""Why a call is not trained on, and what to do about it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from agl.trajectory.call import Call


class DropReason(StrEnum):
    """Why a call is not trained on."""

    SUPERSEDED_ATTEMPT = "superseded_attempt"
    FAILED_CALL = "failed_call"
    REPEATED_ANSWER = "repeated_answer"
    NO_IDS = "no_ids"
    EMPTY_RESPONSE = "empty_response"
    NO_LOGPROBS = "no_logprobs"
    LENGTH_MISMATCH = "length_mismatch"
    MALFORMED = "malformed"

    # What only the trainer can tell.
    NO_REWARD = "no_reward"
    FAILED_ROLLOUT = "failed_rollout"
    ROLE_NOT_TRAINED = "role_not_trained"
    ROLE_FROZEN = "role_frozen"
    STALE = "stale"
    TRUNCATED = "truncated"
    TOO_LONG = "too_long"
    UNKNOWN_TOKENS = "unknown_tokens"
    LATE = "late"
    REPLACED_GROUP = "replaced_group"
    SKIPPED_STEP = "skipped_step"
    ZERO_ADVANTAGE = "zero_advantage"
    REJECTED = "rejected"


@dataclass(frozen=True, slots=True)
class Drop:
    """A call that is in no row. `detail` says what was found and what to do."""

    call: Call
    reason: DropReason
    detail: str


def find_drops(calls: Sequence[Call], attempt_id: str | None) -> list[Drop]:
    """Every call that cannot train, given that `attempt_id` is the attempt that counts."""
    repeated = _repeated(calls)
    unjoined = any(call.through_gateway and call.chat_span_id is None for call in calls)
    return [
        Drop(call, *fault)
        for call in calls
        if (
            fault := _attempt_fault(call, attempt_id)
            or _call_fault(call, id(call) in repeated)
            or _token_fault(call, unjoined)
        )
    ]


_Fault = tuple[DropReason, str] | None


def _repeated(calls: Iterable[Call]) -> set[int]:
    """`id()` of the calls whose answer an earlier call was given: it was sampled once and trains once."""
    known = {(call.response_id, call.choice) for call in calls if call.through_gateway}
    repeated: set[int] = set()
    for call in calls:
        if call.response_id is None or call.through_gateway:
            continue
        answer = call.response_id, call.choice
        if answer in known:
            repeated.add(id(call))
        known.add(answer)
    return repeated


def _attempt_fault(call: Call, attempt_id: str | None) -> _Fault:
    if call.attempt_id in (None, attempt_id):
        return None
    return DropReason.SUPERSEDED_ATTEMPT, f"attempt {call.attempt_id} was followed by {attempt_id}"


def _call_fault(call: Call, is_repeated: bool) -> _Fault:
    if call.error is not None:
        return DropReason.FAILED_CALL, f"the request failed: {call.error}"
    if is_repeated:
        return DropReason.REPEATED_ANSWER, f"answer {call.response_id} belongs to another call; is it from a cache?"
    return None


def _token_fault(call: Call, unjoined: bool) -> _Fault:
    logprobs = call.logprobs
    if call.malformed is not None:
        return DropReason.MALFORMED, f"{call.malformed}; write them as agl.tokens.packing packs them"
    if _is_empty(call):
        return DropReason.EMPTY_RESPONSE, f"the model answered without a token (finish reason: {call.finish_reason})"
    if not call.packed_prompt or call.packed_response is None:
        return DropReason.NO_IDS, _say_no_ids(call, unjoined)
    if logprobs is None:
        return DropReason.NO_LOGPROBS, "set logprobs: true in the request; the engine must return them"
    if len(logprobs) != call.output_tokens:
        counts = f"{call.output_tokens} response tokens but {len(logprobs)} logprobs"
        return DropReason.LENGTH_MISMATCH, f"{counts}; the engine must return one for each token"
    return None


def _is_empty(call: Call) -> bool:
    """No token was sampled. An engine that returns token ids may leave out an empty list of them."""
    if call.packed_response is None:
        return bool(call.packed_prompt) and not call.output_tokens
    return call.packed_response == b""


def _say_no_ids(call: Call, unjoined: bool) -> str:
    if call.through_gateway:
        return (
            "the engine returned no token ids: it must know return_token_ids, or be of `kind: sglang` (gateway.engines)"
        )
    if unjoined:
        return (
            "a gateway call of this rollout could not be joined with a framework span, perhaps this one: switch on the "
            "framework's instrumentor, which sends traceparent with each request"
        )
    return "set return_token_ids: point the model's base URL at the gateway"
