"""Canary and promotion: a candidate answers a share of production, and evidence decides whether it takes over.

assignment     which arm a user or a rollout is in
history        the events of canaries in the store; the last one says what answers production
observation    the rollouts of a canary, read from their spans
table          these rollouts by day and arm, and the plain rule
evidence       the e-process
verdict        what rule, evidence and guards say together
decision       start, promotion and rollback
watch          evaluates a running canary, in `agl serve`
"""
