"""`queue`: the Redis queue between receivers and the store, and its writers."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from agl.config.section import Count, Positive, Section

Appendfsync = Literal["everysec", "always"]


class QueueConfig(Section):
    """The queue in Redis between receivers and the store, and the writers that empty it (`agl serve --queue`)."""

    name: Annotated[str, Field(pattern=r"^[\w.-]+$")] = "agl"
    """Queues of other names in the same Redis are others."""
    appendfsync: Appendfsync = "everysec"
    """The weakest setting of Redis that is accepted: what `everysec` may lose is warned of."""
    high: Count = 5000
    """Spans in the queue; above it writers are added, and `on_queue_high` is called."""
    hard_limit: Count = 100_000
    """Spans in the queue; from there on senders are asked to send again."""
    min_writers: Count = 1
    max_writers: Count = 4
    """Processes."""
    shrink_after_s: Positive = 30.0
    """A writer ends each time that the queue was below half of `high` for so long."""
    check_s: Positive = 1.0
    """Time between two looks at the queue and its writers."""
    claim_after_s: Positive = 60.0
    """What a writer has taken and not finished by then, another takes over."""
    on_queue_high: str | None = None
    """A command, or a URL to POST to, when the queue gets above `high` and each minute that it stays there."""

    @model_validator(mode="after")
    def _is_in_order(self) -> Self:
        if self.max_writers < self.min_writers:
            raise ValueError("max_writers must not be below min_writers")
        if self.hard_limit <= self.high:
            raise ValueError("hard_limit must be above high: else no writer is ever added")
        return self
