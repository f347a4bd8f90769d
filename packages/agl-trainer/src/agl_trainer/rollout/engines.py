"""The engines of a training, one for each base model, as one."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

from agl.config import LogprobsMode
from agl_trainer.rollout.serving import TrainingEngine


class Engines:
    """One or more engines, which sample, pause and change their versions together."""

    def __init__(
        self,
        engines: Sequence[TrainingEngine],
        pause: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """`pause`: context around the pauses of all `engines`."""
        self._engines = tuple(engines)
        self._pause = pause

    @property
    def tokens_sampled(self) -> int | None:
        counts = [engine.tokens_sampled for engine in self._engines]
        return sum(count or 0 for count in counts) if None not in counts else None

    @property
    def logprobs_mode(self) -> LogprobsMode:
        """`processed_logprobs` if all record these."""
        modes = {engine.logprobs_mode for engine in self._engines}
        return "processed_logprobs" if modes == {"processed_logprobs"} else "raw_logprobs"

    def make_live(self) -> None:
        for engine in self._engines:
            engine.make_live()

    @contextmanager
    def running_rollouts(self) -> Iterator[None]:
        with ExitStack() as stack:
            for engine in self._engines:
                stack.enter_context(engine.running_rollouts())
            yield

    @contextmanager
    def paused(self) -> Iterator[None]:
        with self._pause(), ExitStack() as stack:
            for engine in self._engines:
                stack.enter_context(engine.paused())
            yield

    def revive(self) -> None:
        for engine in self._engines:
            engine.revive()
