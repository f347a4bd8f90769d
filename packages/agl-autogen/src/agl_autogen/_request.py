"""What is put on the requests of the OpenAI client: headers, and the wish for token ids."""

import functools
from collections.abc import Callable
from typing import Any

import agl
from agl.failsafe import never_raises
from agl_autogen._call import current_call
from agl_autogen._settings import Settings


def on_the_wire(original: Callable[..., Any], settings: Settings) -> Callable[..., Any]:
    """`_process_create_args`, with `traceparent` and `baggage` among the request's headers.

    So a gateway hangs its own span under ours and knows rollout and role. Where the user wants it, the server is asked
    for token ids and logprobs too.
    """

    @functools.wraps(original)
    def process_create_args(*args: Any, **options: Any) -> Any:
        params = original(*args, **options)
        if (call := current_call()) is not None:
            with never_raises("a model request carries no traceparent"):
                own = params.create_args.get("extra_headers") or {}
                params.create_args["extra_headers"] = {**own, **agl.headers()}
                if settings.captures_token_ids:
                    call.hidden = _ask_for_token_ids(params.create_args)
        return params

    return process_create_args


def _ask_for_token_ids(create_args: dict[str, Any]) -> frozenset[str]:
    """Add to the request what makes vLLM answer with ids and logprobs; the fields that the user did not ask for."""
    body = create_args.get("extra_body") or {}
    hidden: set[str] = set()
    if not body.get("return_token_ids"):
        create_args["extra_body"] = {**body, "return_token_ids": True}
        hidden |= {"prompt_token_ids", "token_ids"}
    if not create_args.get("logprobs"):
        create_args["logprobs"] = True
        hidden.add("logprobs")
    return frozenset(hidden)
