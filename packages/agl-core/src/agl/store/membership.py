"""Which spans belong to a rollout. Every backend implements this rule by its own query (`query_rows` and `gc` use it).

1. The spans that name the rollout.
2. The spans that name no rollout, in the traces of the spans found so far; also in the trace whose id is the rollout
   id, which is how a rollout that no span names is called.
3. The spans that name no rollout, in the traces that share a model response with a span found so far. One side is
   the framework's span of a request (`SpanRow.asked`), the other side is a gateway call without a parent, which is in
   a trace of its own because the request had no `traceparent` (`SpanRow.answered`). A response belongs to the request
   whose span arrived first: later requests with the same response id were served from a cache, or claim what they were
   not given. Arrival is what the store knows itself; a sender chooses the start time.

Rules 2 and 3 repeat until they find nothing new. A span that names another rollout never joins.

In SQL a rollout consists of keys (rollout, trace) of which one is NULL: the rollout id selects the spans that name it,
a trace id selects the spans of that trace that name no rollout. The recursive query itself is the backend's.
"""

from typing import Any, Final

SPANS_OF_KEY: Final = "(rollout_id = :rollout OR (trace_id = :trace AND rollout_id IS NULL))"


def trace_id_of(rollout_id: str) -> bytes | None:
    """The trace id that `rollout_id` spells in hex; None if it does not."""
    try:
        return bytes.fromhex(rollout_id) if len(rollout_id) == 32 else None
    except ValueError:
        return None


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
