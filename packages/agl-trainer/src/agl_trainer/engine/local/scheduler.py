"""The sampling loop: continuous batching over the shared model, one thread.

Each turn of the loop admits waiting requests, computes the prompt tokens that no earlier prompt has computed, and
decodes one token for every running sequence. A prompt's last token is not part of its prefix: it is the first token
that decoding feeds, so prompts need no logits and equal prompts share everything.
"""

import asyncio
import logging
import random
import threading
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from agl_trainer.engine.local.kv import KvShape, PrefixNode, PrefixTree, Slab
from agl_trainer.engine.local.plans import DecodePlan, PrefillPlan, order
from agl_trainer.engine.local.sampling import sample
from agl_trainer.engine.protocol import (
    ContextLengthError,
    EngineError,
    EngineStoppedError,
    FinishReason,
    SampledToken,
    SamplingParams,
    UnknownModelError,
)
from agl_trainer.model.cpu.threads import give_back_workers
from agl_trainer.model.lora import BASE
from agl_trainer.model.policy import Policy

logger = logging.getLogger(__name__)

PREFIX_TOKENS = 65_536
"""Prompt tokens kept for all adapters together."""
SHARED_RUN = 32
SHARED_BY = 4
"""A run of fewer prompt tokens, or of fewer running sequences, is copied to each of them: a decoding step reads the
copies at once and the shared runs one by one."""


Arrival = list[SampledToken] | EngineError | None
"""What a caller gets: some tokens, or why there will be none, or None at the end."""


@dataclass(slots=True, eq=False)
class _Sequence:
    """One sequence from request to last token; also the caller's `Generation`."""

    prompt: list[int]
    adapter: str
    pinned: str | None
    """The version that the request insists on."""
    params: SamplingParams
    source: random.Random
    loop: asyncio.AbstractEventLoop
    version: str = ""
    """Known from admission on: weights may be updated while a request waits."""
    finish_reason: FinishReason | None = None
    cancelled: bool = False
    leaf: PrefixNode | None = None
    """The end of its prompt in the prefix tree, held while it runs."""
    anchor: PrefixNode | None = None
    """Where the part of the prompt ends that it reads from the tree; the rest is copied into its slot."""
    slot: int = -1
    kept: int = 0
    """Tokens in its slot."""
    next_token: int = -1
    sampled: int = 0
    held: list[SampledToken] = field(default_factory=list)
    """Sampled, and not yet handed to the caller."""
    _arrived: asyncio.Queue[Arrival] = field(default_factory=asyncio.Queue)

    def cancel(self) -> None:
        self.cancelled = True

    async def __aiter__(self) -> AsyncIterator[SampledToken]:
        while (item := await self._arrived.get()) is not None:
            if isinstance(item, EngineError):
                raise item
            for token in item:
                yield token

    def put(self, item: Arrival) -> None:
        """Hand `item` to the caller; only on the caller's event loop."""
        self._arrived.put_nowait(item)

    def hand_over(self) -> list[SampledToken]:
        """What the caller has not got yet."""
        given, self.held = self.held, []
        return given

    def take(self, token: SampledToken) -> None:
        """Account for a new token."""
        self.held.append(token)
        self.next_token = token.token_id
        self.kept += 1
        self.sampled += 1
        if token.token_id in self.params.stop_token_ids:
            self.finish_reason = "stop"
        elif self.sampled >= self.params.max_tokens:
            self.finish_reason = "length"


class Scheduler:
    """The in-process engine: samples from the policy's own modules. Use as a context manager."""

    def __init__(self, policy: Policy, *, max_batch: int, max_model_len: int) -> None:
        self._policy = policy
        self._max_batch = max_batch
        self._max_model_len = max_model_len
        self._shape = _kv_shape(policy)
        self._slab = Slab(self._shape, max_batch)
        self._trees: dict[str, PrefixTree] = {}
        self._waiting: deque[_Sequence] = deque()
        self._running: list[_Sequence] = []
        self._plan: DecodePlan | None = None
        self._wake = threading.Condition()
        self._idle = threading.Event()
        self._idle.set()
        self._paused = 0
        self._stopped = False
        self._died = False
        self._thread = self._new_thread()
        self.tokens_sampled = 0
        self.prompt_tokens_computed = 0
        """Each kept prefix counts once, and the last token of every prompt."""

    def __enter__(self) -> "Scheduler":
        give_back_workers()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._wake:
            self._stopped = True
            self._wake.notify()
        self._thread.join()

    def models(self) -> list[str]:
        roles = self._policy.roles
        return [self._policy.base_name, *roles, *map(self._policy.version_name, roles)]

    def submit(self, prompt_ids: Sequence[int], model: str, params: SamplingParams) -> _Sequence:
        """Queue one sequence from a coroutine; see `request.Sampler`."""
        adapter = self._adapter(model)
        if not prompt_ids:
            raise EngineError("the prompt has no tokens; expected at least one")
        if len(prompt_ids) + params.max_tokens > self._max_model_len:
            raise ContextLengthError(
                f"{len(prompt_ids)} prompt tokens and max_tokens {params.max_tokens} exceed this engine's "
                f"max_model_len {self._max_model_len}; shorten the prompt or raise engine.max_model_len"
            )
        sequence = _Sequence(
            prompt=list(prompt_ids),
            adapter=adapter,
            pinned=model if "@" in model else None,
            params=params,
            source=random.Random(params.seed),
            loop=asyncio.get_running_loop(),
        )
        with self._wake:
            if self._stopped or self._died:
                raise EngineStoppedError("the engine has stopped")
            self._waiting.append(sequence)
            self._idle.clear()
            self._wake.notify()
        return sequence

    def revive(self) -> None:
        """Start its thread again where something has ended it."""
        if self._died:
            logger.warning("the engine's thread has ended; starting another")
            self._thread.join()
            self._died = False
            self._thread = self._new_thread()
            self._thread.start()

    def _new_thread(self) -> threading.Thread:
        return threading.Thread(target=self._loop, name="agl-engine", daemon=True)

    def make_live(self) -> None:
        """Nothing to do: what it samples from are the very weights that are trained."""

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Wait for running sequences to end, then hold new ones back: the time to update weights.

        The caller may compute meanwhile, and has no workers afterwards. Kept prompts are forgotten at the end, because
        their keys and values belong to the old weights.
        """
        with self._wake:
            self._paused += 1
        try:
            self._idle.wait()
            yield
        finally:
            with self._wake:
                self._trees.clear()
                self._paused -= 1
                self._wake.notify()
            give_back_workers()

    def _adapter(self, model: str) -> str:
        name, pinned, _ = model.partition("@")
        adapter = BASE if name == self._policy.base_name else name
        known = (self._policy.base_name, *self._policy.roles)
        if name not in known or (pinned and self._policy.version_name(adapter) != model):
            raise UnknownModelError(f"model {model!r} is not served here; known are {', '.join(self.models())}")
        return adapter

    def _loop(self) -> None:
        try:
            with torch.inference_mode():
                while self._await_work():
                    try:
                        with self._policy.lock:
                            self._turn()
                    except Exception as error:  # every waiting caller must hear of it, whatever it was
                        logger.exception("sampling failed")
                        self._fail(EngineError(f"sampling failed: {type(error).__name__}: {error}"))
        finally:  # also where the thread is ended by what is no Exception
            with self._wake:
                self._died = not self._stopped
            self._fail(EngineStoppedError("the engine has stopped"))

    def _await_work(self) -> bool:
        """Block until there is something to do; False once stopped."""
        with self._wake:
            while not self._stopped:
                if self._running or (self._waiting and not self._paused):
                    self._idle.clear()
                    return True
                give_back_workers()
                self._idle.set()
                self._wake.wait()
            return False

    def _turn(self) -> None:
        self._drop([sequence for sequence in self._running if sequence.cancelled])
        if not self._paused:
            self._admit()
        if self._running:
            self._decode()

    def _admit(self) -> None:
        """Move waiting sequences into free slots and compute what is new of their prompts."""
        with self._wake:
            room = self._max_batch - len(self._running)
            waiting = [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]
        admitted = [sequence for sequence in waiting if self._may_start(sequence)]
        for sequence in admitted:
            tree = self._trees.setdefault(sequence.adapter, PrefixTree(self._shape))
            sequence.leaf = tree.insert(sequence.prompt[:-1])
            sequence.next_token = sequence.prompt[-1]
            sequence.slot = len(self._running)
            self._running.append(sequence)
        if admitted:
            self._plan = None
            self.prompt_tokens_computed += len(admitted)
            self._prefill()
            self._share(admitted)

    def _share(self, admitted: Sequence[_Sequence]) -> None:
        """Let every sequence read what it shares with enough others from the tree, and keep the rest in its slot."""
        readers = Counter(node for sequence in self._running for node in _held(sequence.leaf).path())
        for sequence in self._running:
            anchor, tail = _held(sequence.leaf).split_path(
                lambda node: len(node.tokens) >= SHARED_RUN and readers[node] >= SHARED_BY
            )
            if sequence in admitted:
                sequence.anchor, sequence.kept = anchor, self._slab.fill(sequence.slot, tail)
            elif (copied := anchor.end - _held(sequence.anchor).end) > 0:  # it came before the others
                self._slab.forget(sequence.slot, copied, sequence.kept)
                sequence.anchor, sequence.kept = anchor, sequence.kept - copied

    def _may_start(self, sequence: _Sequence) -> bool:
        """Stamp the version that will answer; False for a sequence that nobody wants any more or that cannot be met."""
        sequence.version = self._policy.version_name(sequence.adapter)
        if sequence.cancelled:
            _deliver([(sequence, None)])
        elif sequence.pinned not in (None, sequence.version):
            _deliver([(sequence, UnknownModelError(f"{sequence.pinned} was replaced by {sequence.version}"))])
        else:
            return True
        return False

    def _prefill(self) -> None:
        plan = PrefillPlan(list(self._trees.items()))
        if plan.tokens:
            self._policy.sampled_states(torch.tensor(plan.tokens), torch.tensor(plan.positions), plan.adapters, plan)
            plan.finish()
            self.prompt_tokens_computed += len(plan.tokens)
        for tree in self._trees.values():
            tree.shrink(PREFIX_TOKENS // len(self._trees))

    def _decode(self) -> None:
        """One token for every running sequence."""
        if self._plan is None:
            ranks = order([(sequence.adapter, _held(sequence.anchor)) for sequence in self._running])
            self._running = [self._running[rank] for rank in ranks]
            anchors = [_held(sequence.anchor) for sequence in self._running]
            self._plan = DecodePlan(anchors, [sequence.slot for sequence in self._running], self._slab)
        running = self._running
        self._plan.feed([sequence.kept for sequence in running])
        tokens = torch.tensor([sequence.next_token for sequence in running])
        positions = torch.tensor([len(sequence.prompt) - 1 + sequence.sampled for sequence in running])
        adapters = [sequence.adapter for sequence in running]
        hidden = self._policy.sampled_states(tokens, positions, adapters, self._plan)
        logits = self._policy.logits(hidden)
        sampled = sample(logits, [s.params for s in running], [s.source for s in running])
        for sequence, token in zip(running, sampled, strict=True):
            sequence.take(token)
        self.tokens_sampled += len(sampled)
        due = [sequence for sequence in running if sequence.finish_reason or not sequence.params.deliver_at_end]
        _deliver([(sequence, sequence.hand_over()) for sequence in due])
        self._drop([sequence for sequence in running if sequence.finish_reason])

    def _drop(self, ended: Sequence[_Sequence]) -> None:
        """Free the slots of `ended`; the last slots move into the holes, so that used slots stay the first ones."""
        for sequence in ended:
            self._trees[sequence.adapter].release(_held(sequence.leaf))
        for sequence in sorted(ended, key=lambda sequence: -sequence.slot):  # so that none is moved that ends too
            self._running.remove(sequence)
            last = max(self._running, key=lambda other: other.slot, default=None)
            if last is not None and last.slot > sequence.slot:
                self._slab.move(last.slot, sequence.slot)
                last.slot = sequence.slot
            self._plan = None
        _deliver([(sequence, None) for sequence in ended])

    def _fail(self, error: EngineError) -> None:
        """Give `error` to every caller and start over empty."""
        with self._wake:
            lost = [*self._running, *self._waiting]
            self._running, self._plan = [], None
            self._waiting.clear()
            self._trees.clear()
            self._idle.set()
        _deliver([(sequence, error) for sequence in lost])


def _deliver(items: Sequence[tuple[_Sequence, Arrival]]) -> None:
    """Hand items to their callers, one wake-up for each event loop."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Sequence, Arrival]]] = {}
    for item in items:
        by_loop.setdefault(item[0].loop, []).append(item)
    for loop, batch in by_loop.items():
        try:
            loop.call_soon_threadsafe(_put_all, batch)
        except RuntimeError:
            # The caller's loop is closed: nobody waits any more, so its sequences need not run on.
            for sequence, _ in batch:
                sequence.cancel()


def _put_all(batch: Sequence[tuple[_Sequence, Arrival]]) -> None:
    for sequence, item in batch:
        sequence.put(item)


def _held(node: PrefixNode | None) -> PrefixNode:
    assert node is not None, "a running sequence holds its prompt"
    return node


def _kv_shape(policy: Policy) -> KvShape:
    config = policy.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    weight = policy.output_weight
    return KvShape(config.num_hidden_layers, config.num_key_value_heads, width, weight.dtype, weight.device)
