"""The sampling loop: continuous batching on the policy's own modules, in one thread.

Each iteration admits waiting requests, prefills the prompt tokens that no earlier prompt has computed, and decodes one
token for every running sequence. The last token of a prompt is not part of its prefix: it is the first token that
decoding feeds. So prefill needs no logits, and equal prompts share their whole prefix.
"""

import asyncio
import logging
import random
import threading
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from agl.config import LogprobsMode
from agl_trainer.engine.local.attention_plans import DecodePlan, PrefillPlan, prefix_order
from agl_trainer.engine.local.prefix_tree import KvShape, PrefixTree
from agl_trainer.engine.local.sampling import sample
from agl_trainer.engine.local.sequence import SampledSequence, deliver
from agl_trainer.engine.local.slot_cache import SlotCache
from agl_trainer.engine.protocol import (
    ContextLengthError,
    EngineError,
    EngineStoppedError,
    PromptError,
    SamplingParams,
    UnknownModelError,
)
from agl_trainer.model.attention import AttentionPlan
from agl_trainer.model.cpu.openmp import release_openmp_workers
from agl_trainer.model.lora import BASE
from agl_trainer.model.policy import Policy

logger = logging.getLogger(__name__)

PREFIX_TOKENS = 65_536
"""Capacity of all prefix trees together, in tokens."""
MIN_SHARED_TOKENS = 32
MIN_SHARED_SEQUENCES = 4
"""A run of fewer prompt tokens, or of fewer running sequences, is copied into the slot of each sequence: a decoding
step reads all slots in one call, but needs a call for each shared run."""


class Scheduler:
    """The in-process engine: samples from the policy's own modules. Use as a context manager."""

    logprobs_mode: LogprobsMode = "processed_logprobs"
    running_rollouts = staticmethod(nullcontext[None])

    def __init__(self, policy: Policy, *, max_batch: int, max_model_len: int) -> None:
        self._policy = policy
        self._max_batch = max_batch
        self._max_model_len = max_model_len
        self._shape = _kv_shape(policy)
        self._vocabulary_size = policy.vocabulary_size
        self._cache = SlotCache(self._shape, max_batch)
        self._trees: dict[str, PrefixTree] = {}
        """By adapter."""
        self._waiting: deque[SampledSequence] = deque()
        self._running: list[SampledSequence] = []
        self._plan: DecodePlan | None = None
        self._wake = threading.Condition()
        self._idle = threading.Event()
        self._idle.set()
        self._paused = 0
        """Number of `paused` blocks that are open."""
        self._stopped = False
        self._died = False
        self._thread = self._new_thread()
        self.tokens_sampled = 0
        self.prompt_tokens_computed = 0
        """Each cached prefix counts once, and the last token of every prompt."""

    def __enter__(self) -> "Scheduler":
        release_openmp_workers()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop sampling; all sequences that are not finished fail with EngineStoppedError. May be called twice."""
        with self._wake:
            self._stopped = True
            self._wake.notify()
        self._thread.join()

    def models(self) -> list[str]:
        roles = self._policy.roles
        return [self._policy.base_name, *roles, *map(self._policy.version_name, roles)]

    def submit(self, prompt_ids: Sequence[int], model: str, params: SamplingParams) -> SampledSequence:
        """Queue one sequence; see `protocol.Sampler`. Must be called from a coroutine.

        What would fail in the batch is refused here, because an error there ends all sequences.
        """
        adapter = self._adapter(model)
        if not prompt_ids:
            raise PromptError("the prompt has no tokens; expected at least one")
        if unknown := next((token for token in prompt_ids if not 0 <= token < self._vocabulary_size), None):
            raise PromptError(
                f"the prompt has token {unknown}, but the model has embeddings of the tokens 0 to "
                f"{self._vocabulary_size - 1}; its tokenizer and its weights are not of the same model"
            )
        if len(prompt_ids) + params.max_tokens > self._max_model_len:
            raise ContextLengthError(
                f"{len(prompt_ids)} prompt tokens and max_tokens {params.max_tokens} exceed this engine's "
                f"max_model_len {self._max_model_len}; shorten the prompt or raise engine.max_model_len"
            )
        sequence = SampledSequence(
            prompt=list(prompt_ids),
            adapter=adapter,
            pinned=model if "@" in model else None,
            params=params,
            rng=random.Random(params.seed),
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
        """Start a new thread if the sampling thread has died."""
        if self._died:
            logger.warning("the engine's thread has ended; starting another")
            self._thread.join()
            self._died = False
            self._thread = self._new_thread()
            self._thread.start()

    def _new_thread(self) -> threading.Thread:
        return threading.Thread(target=self._loop, name="agl-engine", daemon=True)

    def make_live(self) -> None:
        """Does nothing: the engine samples from the very weights that are trained."""

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Wait until no sequence runs and admit no new ones in the block, so that weights can be updated.

        The caller may compute in the block; its OpenMP workers are released at the end. Cached prompts are dropped at
        the end, because their keys and values were computed with the old weights.
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
            release_openmp_workers()

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
                            self._step()
                    except Exception as error:  # any error must reach every waiting caller
                        logger.exception("sampling failed")
                        self._fail_all(error)
        finally:  # also if SystemExit or the like ends the thread
            with self._wake:
                self._died = not self._stopped
            self._fail_all()

    def _await_work(self) -> bool:
        """Block until a sequence can be admitted or decoded; returns False once stopped."""
        with self._wake:
            while not self._stopped:
                if self._running or (self._waiting and not self._paused):
                    self._idle.clear()
                    return True
                release_openmp_workers()
                self._idle.set()
                self._wake.wait()
            return False

    def _step(self) -> None:
        self._remove([sequence for sequence in self._running if sequence.cancelled])
        if not self._paused:
            self._admit()
        if self._running:
            self._decode()

    def _admit(self) -> None:
        """Move waiting sequences into free slots and prefill the new part of their prompts."""
        with self._wake:
            free = self._max_batch - len(self._running)
            waiting = [self._waiting.popleft() for _ in range(min(free, len(self._waiting)))]
        admitted = [sequence for sequence in waiting if self._is_admissible(sequence)]
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
            self._share_prefixes(admitted)

    def _share_prefixes(self, admitted: Sequence[SampledSequence]) -> None:
        """Let sequences read widely shared prefixes from the tree, and copy the rest of each prompt into its slot."""
        readers = Counter(node for sequence in self._running for node in sequence.prefix_leaf().path())
        for sequence in self._running:
            anchor, tail = sequence.prefix_leaf().split_path(
                lambda node: len(node.tokens) >= MIN_SHARED_TOKENS and readers[node] >= MIN_SHARED_SEQUENCES
            )
            if sequence in admitted:
                sequence.anchor, sequence.slot_length = anchor, self._cache.fill(sequence.slot, tail)
            elif (shared := anchor.end - sequence.prefix_anchor().end) > 0:
                # An earlier request had its own copy of a prefix that enough others share by now.
                self._cache.drop_first(sequence.slot, shared, sequence.slot_length)
                sequence.anchor, sequence.slot_length = anchor, sequence.slot_length - shared

    def _is_admissible(self, sequence: SampledSequence) -> bool:
        """Set the sequence's version. False if it was cancelled, or requires a version that was replaced."""
        sequence.version = self._policy.version_name(sequence.adapter)
        if sequence.cancelled:
            deliver([(sequence, None)])
        elif sequence.pinned not in (None, sequence.version):
            deliver([(sequence, UnknownModelError(f"{sequence.pinned} was replaced by {sequence.version}"))])
        else:
            return True
        return False

    def _prefill(self) -> None:
        plan = PrefillPlan(list(self._trees.items()))
        if plan.tokens:
            self._sampled_states(plan.tokens, plan.positions, plan.adapters, plan)
            plan.finish()
            self.prompt_tokens_computed += len(plan.tokens)
        for tree in self._trees.values():
            tree.shrink(PREFIX_TOKENS // len(self._trees))

    def _decode(self) -> None:
        """Sample one token for every running sequence."""
        if self._plan is None:
            self._plan = self._new_plan()
        running = self._running
        self._plan.prepare([sequence.slot_length for sequence in running])
        tokens = [sequence.next_token for sequence in running]
        positions = [len(sequence.prompt) - 1 + sequence.sampled for sequence in running]
        hidden = self._sampled_states(tokens, positions, [sequence.adapter for sequence in running], self._plan)
        params, rngs = [s.params for s in running], [s.rng for s in running]
        sampled = sample(self._policy.logits(hidden), params, rngs)
        for sequence, token in zip(running, sampled, strict=True):
            sequence.append(token)
        self.tokens_sampled += len(sampled)
        due = [sequence for sequence in running if sequence.finish_reason or not sequence.params.deliver_at_end]
        deliver([(sequence, sequence.take_undelivered()) for sequence in due])
        self._remove([sequence for sequence in running if sequence.finish_reason])

    def _sampled_states(
        self, tokens: Sequence[int], positions: Sequence[int], adapters: Sequence[str], plan: AttentionPlan
    ) -> Tensor:
        device = self._shape.device
        ids, places = torch.tensor(tokens, device=device), torch.tensor(positions, device=device)
        return self._policy.sampled_states(ids, places, adapters, plan)

    def _new_plan(self) -> DecodePlan:
        """Plan for the running sequences, which are reordered so that those with a shared prefix are adjacent."""
        order = prefix_order([(sequence.adapter, sequence.prefix_anchor()) for sequence in self._running])
        self._running = [self._running[index] for index in order]
        anchors = [sequence.prefix_anchor() for sequence in self._running]
        return DecodePlan(anchors, [sequence.slot for sequence in self._running], self._cache)

    def _remove(self, ended: Sequence[SampledSequence]) -> None:
        """Free the slots of `ended`. The highest slots move into the gaps, so that slots 0..N-1 are in use."""
        for sequence in ended:
            self._trees[sequence.adapter].release(sequence.prefix_leaf())
        for sequence in sorted(ended, key=lambda sequence: -sequence.slot):  # so that only remaining slots are moved
            self._running.remove(sequence)
            last = max(self._running, key=lambda other: other.slot, default=None)
            if last is not None and last.slot > sequence.slot:
                self._cache.move(last.slot, sequence.slot)
                last.slot = sequence.slot
            self._plan = None
        deliver([(sequence, None) for sequence in ended])

    def _fail_all(self, error: Exception | None = None) -> None:
        """Raise in every caller that its sequence failed by `error`, or that the engine has stopped; discard all."""
        with self._wake:
            failed, batch = [*self._running, *self._waiting], len(self._running)
            self._running, self._plan = [], None
            self._waiting.clear()
            self._trees.clear()
            self._idle.set()
        deliver([(sequence, _failure(sequence, batch, error)) for sequence in failed])


def _failure(sequence: SampledSequence, batch: int, error: Exception | None) -> EngineError:
    if error is None:
        return EngineStoppedError("the engine has stopped")
    return EngineError(
        f"sampling failed: {type(error).__name__}: {error}; requests in the batch: {batch}; this one: "
        f"{sequence.version or sequence.adapter}, prompt tokens {len(sequence.prompt)}, sampled {sequence.sampled}"
    )


def _kv_shape(policy: Policy) -> KvShape:
    config = policy.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    weight = policy.output_weight
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return KvShape(config.num_hidden_layers, kv_heads, head_dim, weight.dtype, weight.device)
