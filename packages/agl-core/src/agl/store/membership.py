"""Which spans belong to a rollout. Every backend implements this rule by its own query (`query_rows` and `gc` use it).

1. The spans that name the rollout.
2. The spans that name no rollout, in the traces of the spans found so far; also in the trace whose id is the rollout
   id, which is how a rollout that no span names is called.
3. The spans that name no rollout, in the traces that share a model response with a span found so far. One side is
   the framework's span of a request (`SpanRow.asked`), the other side is a gateway call without a parent, which is in
   a trace of its own because the request had no `traceparent` (`SpanRow.answered`). A response belongs to the request
   that started first: later requests with the same response id were served from a cache.

Rules 2 and 3 repeat until they find nothing new. A span that names another rollout never joins.
"""


def trace_id_of(rollout_id: str) -> bytes | None:
    """The trace id that `rollout_id` spells in hex; None if it does not."""
    try:
        return bytes.fromhex(rollout_id) if len(rollout_id) == 32 else None
    except ValueError:
        return None
