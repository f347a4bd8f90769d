"""The page: what a store holds, as HTML for people. It only reads.

site       routes, templates, login and headers
shown      how values are written: text without control characters, times, numbers
rollouts   the list of rollouts, and one rollout with its tree, texts and tokens
tokens     a call's tokens with what training did with each
"""
