"""Reasons why a call does not train, each with a message that says what was found and what to do."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from agl.trajectory.call import Call

_GREEDY_TEMPERATURE: Final = 1e-5
"""vLLM and SGLang sample greedily below it."""


class DropReason(StrEnum):
    """Why a call does not train."""

    SUPERSEDED_ATTEMPT = "superseded_attempt"
    FAILED_CALL = "failed_call"
    REPEATED_ANSWER = "repeated_answer"
    NO_IDS = "no_ids"
    EMPTY_RESPONSE = "empty_response"
    NO_LOGPROBS = "no_logprobs"
    LENGTH_MISMATCH = "length_mismatch"
    MALFORMED = "malformed"
    DAMAGED = "damaged"

    # Found by the trainer:
    GREEDY = "greedy"
    RAW_LOGPROBS = "raw_logprobs"
    CONSTRAINED = "constrained"
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


ADVICE: Final[Mapping[DropReason, str]] = {
    DropReason.GREEDY: "sampled at temperature 0; sample at a temperature above 0",
    DropReason.RAW_LOGPROBS: "an older version sampled it, and the engine recorded other logprobs than those of its "
    "distribution; start vLLM with --logprobs-mode processed_logprobs",
    DropReason.CONSTRAINED: "request fields kept the engine from the model's full distribution; `agl inspect` names "
    "them",
    DropReason.NO_REWARD: "no reward reaches the call; set train.reward, or call agl.emit_reward in the agent",
    DropReason.FAILED_ROLLOUT: "the agent raised or timed out; `agl rollouts --error` lists the errors",
    DropReason.ROLE_NOT_TRAINED: "agent_roles does not have its role; add it, or map the name with agl.role",
    DropReason.ROLE_FROZEN: "see agent_roles.<role>.frozen and train.alternate_steps",
    DropReason.STALE: "the version that sampled it is too old; raise train.max_staleness",
    DropReason.TRUNCATED: "the response reached its maximum length; raise train.max_tokens",
    DropReason.TOO_LONG: "it ends beyond engine.max_model_len; raise that",
    DropReason.UNKNOWN_TOKENS: "token ids beyond the vocabulary; train on spans of the role's base model only",
    DropReason.LATE: "made after its rollout had timed out; raise train.timeout_s",
    DropReason.REPLACED_GROUP: "all rollouts of its group earned the same, and so did those of the group in its place",
    DropReason.SKIPPED_STEP: "the gradient was not finite; lower train.learning_rate",
    DropReason.ZERO_ADVANTAGE: "all rollouts of its group earned the same: the tasks are too easy or too hard, or the "
    "reward is too coarse; compare rollouts with `agl rollouts`",
    DropReason.REJECTED: "its rollout earned less than train.min_reward, or than others of its group",
}
"""What the reasons that the trainer finds mean, and what to do."""


@dataclass(frozen=True, slots=True)
class Drop:
    """A call that is in no row. `detail` says what was found and what to do."""

    call: Call
    reason: DropReason
    detail: str


def find_drops(calls: Sequence[Call], attempt_id: str | None, damaged: int = 0) -> list[Drop]:
    """Every call that cannot train in the trajectory of attempt `attempt_id`; none can if spans are `damaged`."""
    repeated = _repeated(calls)
    some_unjoined = any(call.through_gateway and call.chat_span_id is None for call in calls)
    return [
        Drop(call, *fault)
        for call in calls
        if (
            fault := _attempt_fault(call, attempt_id)
            or _damage_fault(damaged)
            or _call_fault(call, id(call) in repeated)
            or _token_fault(call, some_unjoined)
        )
    ]


def sampling_fault(call: Call, declared: Mapping[str, float] | None = None) -> tuple[DropReason, str] | None:
    """Why the policy gradient of `call` would be biased, and what to do; None if it is not.

    `declared` are the limits of the distribution that the training accounts for; None: those that the call was sampled
    with. Training by likelihood (SFT, algorithm rejection) has no such bias.
    """
    if call.temperature is not None and call.temperature < _GREEDY_TEMPERATURE:
        return (
            DropReason.GREEDY,
            f"at temperature {call.temperature:g} the likeliest token is always taken, so no call shows what another "
            "token earns; sample at a temperature above 0",
        )
    if declared is not None and declared != call.sampling:
        return (
            DropReason.CONSTRAINED,
            f"it was sampled with {dict(call.sampling)}, but this training accounts for {dict(declared)}; set "
            "train.sampling to the former, and train on new rollouts",
        )
    if call.constraints:
        return (
            DropReason.CONSTRAINED,
            f"{', '.join(call.constraints)} kept the engine from sampling the model's full distribution, of which the "
            "trainer computes logprobs; ask for the format in the prompt, offer tools with tool_choice auto, and make "
            "calls in mode train, in which the gateway leaves out top_p, penalties and their like",
        )
    return None


_Fault = tuple[DropReason, str] | None


def _repeated(calls: Iterable[Call]) -> set[int]:
    """`id()` of the calls that returned the response of an earlier call: it was sampled once, so it trains once.

    A response id alone does not show that: several requests may have been answered with the same. Then the tokens do.
    """
    known: dict[tuple[str | None, int], list[Call]] = {}
    for call in calls:
        if call.through_gateway:
            known.setdefault((call.response_id, call.choice), []).append(call)
    ambiguous = {response for response, answered in known.items() if len(answered) > 1}
    repeated: set[int] = set()
    for call in calls:
        response = call.response_id, call.choice
        if call.response_id is None or call.through_gateway:
            continue
        earlier = known.setdefault(response, [])
        if any(_is_same_answer(one, call, response not in ambiguous) for one in earlier):
            repeated.add(id(call))
        earlier.append(call)
    return repeated


def _is_same_answer(one: Call, other: Call, unless_ids_differ: bool) -> bool:
    if one.packed_response is None or other.packed_response is None:
        return unless_ids_differ
    return (one.packed_prompt, one.packed_response) == (other.packed_prompt, other.packed_response)


def _attempt_fault(call: Call, attempt_id: str | None) -> _Fault:
    if call.attempt_id in (None, attempt_id):
        return None
    return (
        DropReason.SUPERSEDED_ATTEMPT,
        f"the call is of attempt {call.attempt_id}, but only the rollout's last attempt, {attempt_id}, trains",
    )


def _damage_fault(damaged: int) -> _Fault:
    if not damaged:
        return None
    return (
        DropReason.DAMAGED,
        f"the store no longer has {damaged} of the rollout's spans as they were stored, perhaps rewards or calls; "
        "`agl store check` lists all damage, `agl store repair` sets it aside",
    )


def _call_fault(call: Call, is_repeated: bool) -> _Fault:
    if call.error is not None:
        return DropReason.FAILED_CALL, f"the request failed: {call.error}"
    if is_repeated:
        return (
            DropReason.REPEATED_ANSWER,
            f"response {call.response_id} was sampled for another call and trains there; if a client cache returned it "
            "again, turn the cache off to train on each call",
        )
    if call.is_cached:
        return (
            DropReason.REPEATED_ANSWER,
            "a cache in the agent answered, so nothing was sampled; turn the cache off to train on each call",
        )
    return None


def _token_fault(call: Call, some_unjoined: bool) -> _Fault:
    if call.malformed is not None:
        return (
            DropReason.MALFORMED,
            f"the token ids or logprobs cannot be used: {call.malformed}; report it to the engine, or write imported "
            "spans with agl.tokens.packing or plain arrays of numbers",
        )
    if call.miscounted is not None:
        return DropReason.LENGTH_MISMATCH, f"{call.miscounted}; report it to the engine"
    if _is_empty(call):
        return (
            DropReason.EMPTY_RESPONSE,
            f"the model returned no token (finish reason: {call.finish_reason}), so there is nothing to train on",
        )
    if not call.packed_prompt or call.packed_response is None:
        return DropReason.NO_IDS, _no_ids_message(call, some_unjoined)
    if call.logprobs is None:
        return (
            DropReason.NO_LOGPROBS,
            "the response has no logprobs: set logprobs: true in the request, and use an engine that returns them",
        )
    if len(call.logprobs) != call.output_tokens:
        counts = f"{call.output_tokens} response tokens but {len(call.logprobs)} logprobs"
        return DropReason.LENGTH_MISMATCH, f"the engine returned {counts}; it must return one logprob per token"
    return None


def _is_empty(call: Call) -> bool:
    """No token was sampled. An engine that returns token ids may leave out an empty list of them."""
    if call.packed_response is None:
        return bool(call.packed_prompt) and not call.output_tokens
    return call.packed_response == b""


def _no_ids_message(call: Call, some_unjoined: bool) -> str:
    if call.through_gateway:
        return (
            "the engine returned no token ids: it must know return_token_ids, or be of `kind: sglang` (gateway.engines)"
        )
    if some_unjoined:
        return (
            "this call has no token ids, and a gateway call of the rollout, perhaps the same request, has no framework "
            "span: switch on the framework's instrumentor, which sends the traceparent header that joins them"
        )
    return (
        "set return_token_ids: point the model's base URL at the gateway; if it is the gateway's already, its span of "
        "this call is in another trace: switch on the instrumentor, or that of the HTTP client, or send agl.headers(), "
        "which join the two"
    )
