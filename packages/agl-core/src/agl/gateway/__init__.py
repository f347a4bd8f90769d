"""The gateway: a proxy before engines that records the exact tokens of every call before it is answered.

proxy      the app
identity   who calls: rollout, attempt, mode, role and parent span of a request
dialect    the APIs that clients speak, and how engines are asked in theirs
request    what is sent: the client's request, what capture needs, what the mode forces
routing    which engine gets a call, and by which model name
dispatch   the way there: a place at the engine (`slots`), more tries, a second engine; closed for a pause (`gate`)
engine     one engine; `health` says whether it answers
shape      how an engine is asked for token ids, and given them
answer     what an engine answers, hop by hop within its time; `wire` has its events
exchange   one call on its way: engine, record, client
record     what is kept: a call as spans; `recorder` writes them
continuation  calls that continue a conversation: `history` holds what was sampled, `suffix` and `tokenizer` find what
           comes behind it, `wording` names the kind of drift
control    pause, resume, and which version a name stands for, over HTTP

`agl.tokens.capture` reads the tokens of an answer, and makes of it what the client asked for.
"""

from agl.gateway.proxy import Gateway

__all__ = ["Gateway"]
