"""SQL for the rule of `agl.store.membership`. The recursive query itself is the backend's.

A rollout consists of keys (rollout, trace) of which one is NULL: the rollout id selects the spans that name it, a trace
id selects the spans of that trace that name no rollout.
"""

from typing import Any, Final

from agl.store.membership import trace_id_of

SPANS_OF_KEY: Final = "(rollout_id = :rollout OR (trace_id = :trace AND rollout_id IS NULL))"


def first_keys(rollout_id: str) -> dict[str, Any]:
    """Parameters of the recursive query: the keys that it starts from."""
    return {"rollout": rollout_id, "trace": trace_id_of(rollout_id)}


def owners_query(join_requester: str) -> str:
    """Query for the rollouts to which the spans of `:trace` that name no rollout may belong.

    `join_requester` joins `own`, a gateway call, with `requester`, the spans that requested its response. The result
    may have a rollout too many: then the next `gc` deletes the spans.
    """
    return f"""
SELECT rollout_id FROM spans WHERE trace_id = :trace AND rollout_id IS NOT NULL
UNION
SELECT requester.rollout_id FROM spans own {join_requester}
WHERE own.trace_id = :trace AND own.rollout_id IS NULL AND requester.rollout_id IS NOT NULL
UNION
SELECT answer.rollout_id FROM spans own JOIN spans answer ON answer.answered = own.asked
WHERE own.trace_id = :trace AND own.rollout_id IS NULL AND answer.rollout_id IS NOT NULL
"""
