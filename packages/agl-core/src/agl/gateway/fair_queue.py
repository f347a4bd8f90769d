"""Places at an engine, and the queue before them: rollouts take turns, however many calls each has waiting."""

import asyncio
from collections import OrderedDict, deque


class Slots:
    """At most `limit` calls at once. Of the rollouts that wait, each gets one place in turn; its calls in their order.

    For one event loop.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.in_use = 0
        self._queues: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    @property
    def waiting(self) -> int:
        return sum(map(len, self._queues.values()))

    async def take(self, rollout: str) -> None:
        """Wait for a place for a call of `rollout`; `give_back` it afterwards."""
        if self.in_use < self.limit and not self._queues:
            self.in_use += 1
            return
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queues.setdefault(rollout, deque()).append(place)
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                self.give_back()  # It was handed over just before.
            else:
                self._leave(rollout, place)
            raise

    def give_back(self) -> None:
        """Hand the place to the next rollout in turn."""
        while self._queues:
            rollout, queue = self._queues.popitem(last=False)
            place = queue.popleft()
            if queue:
                self._queues[rollout] = queue  # Behind the others.
            if not place.done():
                place.set_result(None)
                return
        self.in_use -= 1

    def _leave(self, rollout: str, place: asyncio.Future[None]) -> None:
        queue = self._queues.get(rollout)
        if queue is not None and place in queue:
            queue.remove(place)
            if not queue:
                del self._queues[rollout]
