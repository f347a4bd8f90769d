"""Tells accidents, after which a process starts again, from a process that cannot run."""

from dataclasses import dataclass, field


@dataclass(slots=True)
class Deaths:
    """The deaths of each process; more than `limit` of one in `within_s` seconds are no accident."""

    limit: int
    within_s: float
    _times: dict[str, list[float]] = field(default_factory=dict)

    def are_no_accident(self, name: str, now: float) -> bool:
        """Note a death of `name` at the time `now`, in seconds; returns whether it has died too often."""
        recent = [time for time in self._times.get(name, ()) if now - time < self.within_s]
        self._times[name] = [*recent, now]
        return len(self._times[name]) > self.limit
