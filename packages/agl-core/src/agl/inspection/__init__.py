"""A rollout as people look at it, in a terminal or on a page."""
