"""The page: what a store holds, as HTML for people. It only reads.

site        routes, templates, login and headers
shown       how values are written: text without control characters, times, numbers
runs        curves of a training, and what is wrong with it in words
groups      the rollouts of a task side by side
comparison  two evaluations on the same tasks
rollouts    the list of rollouts, and one rollout with its tree, texts and tokens
tokens      a call's tokens with what training did with each
adapters    published versions by role
canary      what was decided about candidates, and both arms by day
metrics     the numbers of `/metrics` that are read when Prometheus asks

`static/vendor` has htmx 2.0.11 (Zero-Clause BSD) and uPlot 1.6.32 (MIT) as npm has them, with their licences.
"""
