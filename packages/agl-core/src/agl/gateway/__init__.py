"""The gateway: an OpenAI-compatible proxy that records the exact tokens of every call before it is answered.

identity   who calls: rollout, attempt, mode, role and parent span of a request
request    what is sent: the client's body, what capture needs, what the mode forces
wire       how an answer comes back; `agl.capture` reads its tokens, and makes of it what the client asked for
record     what is kept: a call as spans
exchange   one call on its way: engine, record, client
proxy      the app
"""

from agl.gateway.proxy import Gateway

__all__ = ["Gateway"]
