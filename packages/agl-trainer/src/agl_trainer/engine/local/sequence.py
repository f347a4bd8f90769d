"""One sequence from request to last token, and the delivery of its tokens to the caller's event loop."""

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from agl_trainer.engine.local.prefix_tree import PrefixNode
from agl_trainer.engine.protocol import EngineError, FinishReason, SampledToken, SamplingParams

Delivery = list[SampledToken] | EngineError | None
"""Some tokens, the reason why sampling failed, or None at the end."""


@dataclass(slots=True, eq=False)
class SampledSequence:
    """State of one sequence; also the caller's `Generation`."""

    prompt: list[int]
    adapter: str
    pinned: str | None
    """The policy version that the request requires."""
    params: SamplingParams
    rng: random.Random
    loop: asyncio.AbstractEventLoop
    """The caller's event loop."""
    version: str = ""
    """Set on admission, because weights may be updated while a request waits."""
    finish_reason: FinishReason | None = None
    cancelled: bool = False
    leaf: PrefixNode | None = None
    """End of the prompt in the prefix tree, in use while the sequence runs."""
    anchor: PrefixNode | None = None
    """Last node that the sequence reads from the tree; the tokens after it are copied into its slot."""
    slot: int = -1
    slot_length: int = 0
    """Tokens in its slot."""
    next_token: int = -1
    sampled: int = 0
    """Number of tokens sampled."""
    undelivered: list[SampledToken] = field(default_factory=list)
    _deliveries: asyncio.Queue[Delivery] = field(default_factory=asyncio.Queue)

    def cancel(self) -> None:
        self.cancelled = True

    async def __aiter__(self) -> AsyncIterator[SampledToken]:
        while (delivery := await self._deliveries.get()) is not None:
            if isinstance(delivery, EngineError):
                raise delivery
            for token in delivery:
                yield token

    def put(self, delivery: Delivery) -> None:
        """Hand `delivery` to the caller; must run on the caller's event loop."""
        self._deliveries.put_nowait(delivery)

    def take_undelivered(self) -> list[SampledToken]:
        tokens, self.undelivered = self.undelivered, []
        return tokens

    def append(self, token: SampledToken) -> None:
        """Add a sampled token, and set the finish reason if it is the last one."""
        self.undelivered.append(token)
        self.next_token = token.token_id
        self.slot_length += 1
        self.sampled += 1
        if token.token_id in self.params.stop_token_ids:
            self.finish_reason = "stop"
        elif self.sampled >= self.params.max_tokens:
            self.finish_reason = "length"

    def prefix_leaf(self) -> PrefixNode:
        assert self.leaf is not None, "a running sequence has its prompt in the prefix tree"
        return self.leaf

    def prefix_anchor(self) -> PrefixNode:
        assert self.anchor is not None, "a running sequence has an anchor in the prefix tree"
        return self.anchor


def deliver(items: Sequence[tuple[SampledSequence, Delivery]]) -> None:
    """Hand items to their callers from the sampling thread, with one wake-up per event loop."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[SampledSequence, Delivery]]] = {}
    for item in items:
        by_loop.setdefault(item[0].loop, []).append(item)
    for loop, batch in by_loop.items():
        try:
            loop.call_soon_threadsafe(_put_all, batch)
        except RuntimeError:
            # The caller's loop is closed, so nobody waits for these sequences.
            for sequence, _ in batch:
                sequence.cancel()


def _put_all(batch: Sequence[tuple[SampledSequence, Delivery]]) -> None:
    for sequence, delivery in batch:
        sequence.put(delivery)
