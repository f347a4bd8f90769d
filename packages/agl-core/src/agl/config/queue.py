"""`queue`: the Redis queue between receivers and store, and its writers."""

from typing import Annotated, Literal, Self

from pydantic import Field, SecretStr, model_validator

from agl.config.section import Count, Positive, Section

Appendfsync = Literal["everysec", "always"]


class QueueConfig(Section):
    """The Redis queue between receivers and store, and the writers that move its spans (`agl serve --queue`)."""

    name: Annotated[str, Field(pattern=r"^[\w.-]+$")] = "agl"
    """Name of the queue; one Redis can have several queues."""
    appendfsync: Appendfsync = "everysec"
    """Weakest setting of Redis that is accepted. `everysec` can lose spans, and a warning says so."""
    high: Count = 5000
    """Number of queued spans above which writers are added and `on_queue_high` is called."""
    hard_limit: Count = 100_000
    """Number of queued spans from which on senders are asked to retry."""
    min_writers: Count = 1
    """Minimum number of processes that move spans into the store."""
    max_writers: Count = 4
    """Maximum number of such processes."""
    shrink_after_s: Positive = 30.0
    """One writer ends each time that the queue has been shorter than half of `high` for this long."""
    check_s: Positive = 1.0
    """Time between two checks of the queue and its writers."""
    claim_after_s: Positive = 60.0
    """Spans that a writer took this long ago without committing them are given to another writer."""
    on_queue_high: SecretStr | None = None
    """A command to run, or a URL to POST to, when the queue exceeds `high`, and every minute while it does. It is never
    shown: webhooks have their secret in the path."""

    @model_validator(mode="after")
    def _is_in_order(self) -> Self:
        if self.max_writers < self.min_writers:
            raise ValueError("max_writers must not be below min_writers")
        if self.hard_limit <= self.high:
            raise ValueError("hard_limit must be above high: otherwise no writer is ever added")
        return self
