"""The gateway: a proxy in front of engines that records the exact tokens of every call before the call ends.

proxy          the ASGI app and its routes
exchange       one call: request, engine, response, record
request        the client's request: caller, seed, fields added for the engine, fields neutral in training
dialect        the APIs that clients speak
token_count    the number of tokens of a prompt, without a call
dispatch       the way to an engine: routing, pause, slots, retries, hedging
engine         one engine: queue, key, response; `engine_kind` has vLLM's and SGLang's fields
record         the call as spans, and their commit to the store
conversation   the tokens sampled before, by the messages of a conversation
exact_prefix   prompts built from these tokens; `tokenizer` asks the engine's
drift_kind     prompts that differ from these tokens
control        pause, resume and model names over HTTP
health         which engines are reachable
"""

from agl.gateway.proxy import Gateway

__all__ = ["Gateway"]
