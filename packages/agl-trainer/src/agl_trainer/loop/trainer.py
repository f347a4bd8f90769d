"""The trainer of a configuration: opens a training, and runs its phases."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Self

import torch

from agl.config import Config
from agl.errors import TrainingError
from agl.runner.run_id import run_of
from agl.store import Store
from agl_trainer.loop.evaluation import evaluate, load_best
from agl_trainer.loop.grpo import run_grpo
from agl_trainer.loop.output_folder import claim_run, locked, set_state
from agl_trainer.loop.session import Session, open_session, open_store_session
from agl_trainer.loop.sft import run_sft
from agl_trainer.loop.training import Training
from agl_trainer.model.cpu.openmp import warn_if_workers_spin
from agl_trainer.report.cpu_share import shows_cpu_share
from agl_trainer.report.evaluation import EvalResult
from agl_trainer.report.progress import Progress
from agl_trainer.report.scoring import Sampling


class Trainer:
    """Trains the roles of a configuration. Use `open` as a context manager, or `fit` for the whole training.

    A training that was killed or interrupted resumes at its last checkpoint in `train.output_dir`. It refuses a
    configuration, or a base model, that changes what is trained, unless `accept_changes` is True.
    """

    def __init__(self, config: Config, *, accept_changes: bool = False) -> None:
        self.config = config
        self._accepts_changes = accept_changes
        self.train = config.require_train()
        config.require_roles()
        self.bases = config.bases()
        self.folder = Path(self.train.output_dir).absolute()  # An agent may change the current folder.
        self._opened: Training | None = None

    @classmethod
    def from_config(cls, path: str | Path, *, accept_changes: bool = False) -> Self:
        """Raises ConfigError as `Config.load`, also without a section `train`."""
        return cls(Config.load(path), accept_changes=accept_changes)

    @contextmanager
    def open(self, *, samples: bool = True, resumes: bool = True, trains: bool = True) -> Iterator[Self]:
        """Start store, engine and gateway, and restore the last checkpoint.

        Without `samples` there is no engine, only training on the store's rollouts or on examples. Without `resumes`
        the adapters are fresh: the policy is the base model. Raises TrainingError if another training runs in
        `train.output_dir`. Without `trains` this trainer only evaluates, and a training may run beside it, but not with
        vLLM: both would load and unload adapters under the same names.
        """
        if self.train.deterministic:
            torch.use_deterministic_algorithms(True)
        with (
            self._lock(trains),
            Progress() as progress,
            shows_cpu_share(progress),
            ExitStack() as stack,
        ):
            models = ", ".join(base.path for base in self.bases)
            loading, phase = stack.enter_context(ExitStack()), progress.phase(f"loading {models}")
            if not samples:  # There is no page.
                loading.enter_context(phase)

            def announce(store: Store, page_url: str) -> None:
                """The address of the page is the first line, and works: the page says that the model is loading."""
                if trains:
                    set_state(store, claim_run(self.folder, store), "loading")
                    progress.note(f"page: {page_url}")
                loading.enter_context(phase)

            opened = open_session(self.config, progress, announce) if samples else open_store_session(self.config)
            session = stack.enter_context(opened)
            warn_if_workers_spin()
            loading.close()
            training = Training(self.config, session, progress, accepts_changes=self._accepts_changes, trains=trains)
            if resumes:
                training.resume()
            self._opened = training
            training.set_state("training")
            try:
                yield self
                training.set_state("ended")
            except KeyboardInterrupt:
                training.set_state("ended")
                raise
            finally:
                self._opened = None
                training.close()

    def _lock(self, trains: bool) -> AbstractContextManager[None]:
        if trains:
            return locked(self.folder)
        has_servers = any(base.engine.kind != "local" for base in self.bases)
        return locked(self.folder, "an evaluation") if has_servers else nullcontext()

    @property
    def run(self) -> str:
        """Id of the run, under which the store has its metrics."""
        return run_of(self.folder)

    @property
    def _training(self) -> Training:
        if self._opened is None:
            raise TrainingError("the trainer is not open; use `with trainer.open():`")
        return self._opened

    @property
    def session(self) -> Session:
        """Store, policies and engine of the open training."""
        return self._training.session

    def fit(self, *, from_store: bool = False) -> None:
        """Open, take all remaining GRPO steps, and close. `from_store`: on rollouts that the store already has."""
        with self.open(samples=not from_store):
            self.grpo(from_store=from_store)

    def sft(self) -> bool:
        """All remaining supervised steps; once GRPO has begun, none: a line says so, and it returns False."""
        return run_sft(self._training)

    def grpo(self, *, from_store: bool = False) -> None:
        """All remaining GRPO steps, on new rollouts or on those of the store, unless `train.early_stop` ends them."""
        run_grpo(self._training, from_store=from_store)

    def evaluate(self, label: str, sampling: Sampling | None = None) -> EvalResult:
        """Rewards of each held-out task under the current adapters; a failed rollout counts as 0."""
        return evaluate(self._training, label, sampling)

    def take_best(self) -> None:
        """Load the adapters of the best evaluation. Raises TrainingError if there was none."""
        load_best(self._training)
