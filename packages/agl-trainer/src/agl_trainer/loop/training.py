"""An open training: what its phases share."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from agl.config import Config
from agl.errors import TrainingError
from agl.inspection.token_text import tokenizer_file
from agl.page.runs import RunState
from agl.store import Resource
from agl_trainer.loop.call_log import CallLog
from agl_trainer.loop.changes import ANY, Change, changes_since, listed
from agl_trainer.loop.checkpoint import Checkpoint, load_latest, prune, save_checkpoint
from agl_trainer.loop.output_folder import adapter_name, claim_run, set_state
from agl_trainer.loop.policy_setup import fingerprints
from agl_trainer.loop.session import Session
from agl_trainer.loop.state import TrainingState, restore
from agl_trainer.model.adapter_files import save_adapter
from agl_trainer.report.metrics import MetricsLog
from agl_trainer.report.progress import Progress
from agl_trainer.report.trackers import open_trackers
from agl_trainer.rollout.rollouts import Rollouts


class Training:
    """Session, state, metrics and checkpoints of a training."""

    def __init__(
        self,
        config: Config,
        session: Session,
        progress: Progress,
        *,
        accepts_changes: bool = False,
        trains: bool = True,
    ) -> None:
        """`accepts_changes`: it resumes although what it trains has changed since the checkpoint."""
        self.config = config
        self.train = config.require_train()
        self.session = session
        self.policies = session.policies
        self.store = session.store
        self.progress = progress
        self.folder = Path(self.train.output_dir).absolute()  # An agent may change the current folder.
        self.run = claim_run(self.folder, self.store)
        self._keep_tokenizers()
        self._trains = trains
        self.state = TrainingState()
        self.base = fingerprints(config, session.policies)
        """Fingerprints of the base models."""
        self._accepts_changes = accepts_changes
        self._changes: list[Change] = []
        """Changes that the phase of the checkpoint does not accept."""
        self.call_log = CallLog(session.store, self.run)
        self._metrics: MetricsLog | None = None
        serving = session.serving
        self._rollouts = (
            Rollouts(self.store, serving, progress, self.run, self.train.engine_retries) if serving else None
        )

    def _keep_tokenizers(self) -> None:
        """The page shows the texts of tokens."""
        for base, policy in zip(self.config.bases(), self.policies, strict=True):
            if isinstance(policy.tokenizer, PreTrainedTokenizerFast):
                for role in base.roles if base.is_one_of else (None,):
                    policy.tokenizer.backend_tokenizer.save(str(self.folder / tokenizer_file(role)))

    @property
    def rollouts(self) -> Rollouts:
        """Raises TrainingError if the training was opened without an engine."""
        if self._rollouts is None:
            raise TrainingError("the trainer was opened without an engine; use `with trainer.open():`")
        return self._rollouts

    def resume(self) -> None:
        """Restore the latest checkpoint, if there is one.

        Changes of what is trained raise TrainingError unless they are accepted; others are applied and named.
        """
        checkpoint = load_latest(self.folder / "checkpoints")
        if checkpoint is None:
            if not self._trains:
                raise TrainingError(
                    f"there is no checkpoint in {self.folder}, so nothing to evaluate but the base model: train first, "
                    "or use `agl eval --of base` (trainer.open(resumes=False))"
                )
            return
        changes = changes_since(checkpoint, self.config, self.base)
        self._refuse([change for change in changes if change.fixed_in == ANY])
        self.state = restore(checkpoint, self.policies)
        self._changes = [change for change in changes if change.fixed_in == self.state.phase]
        applied = [change for change in changes if self._accepts_changes or change not in self._changes]
        if applied:
            self.progress.note(f"resumed at step {self.state.step} with changes: {listed(applied)}")

    def _refuse(self, changes: Sequence[Change]) -> None:
        if changes and not self._accepts_changes:
            raise TrainingError(
                f"{self.folder} was trained with another configuration: {listed(changes)}. Change it back, choose "
                "another train.output_dir to start anew, or accept the changes with --accept-changes "
                "(Trainer(config, accept_changes=True))"
            )

    def enter(self, phase: str) -> None:
        """Begin `phase`, or continue in it.

        Raises TrainingError if what it trains on has changed, or the trainer was opened only to evaluate.
        """
        if not self._trains:
            raise TrainingError("the trainer was opened with trains=False; use `with trainer.open():`")
        if self.state.phase == phase:
            self._refuse(self._changes)
        if self._metrics is None:
            self._metrics = self._open_metrics()
        self.forget_prompts()
        self.state.enter(phase, self.policies, self.train)

    def count_items(self, key: str, count: int) -> None:
        """Remember that an epoch has `count` items, which `key` names. Raises TrainingError if it had another number.

        The position in the phase counts items, so it is that of other items if their number changes.
        """
        saved = self.state.epoch_size
        if saved and saved != count:
            self._refuse([Change(f"the number of items of {key}", saved, count, self.state.phase)])
        self.state.epoch_size = count

    def tokens_sampled(self) -> int | None:
        """Tokens sampled since the engine was opened; None if there is no engine or it does not count them."""
        serving = self.session.serving
        return serving.engine.tokens_sampled if serving else None

    @contextmanager
    def weights_locked(self) -> Iterator[None]:
        """Context in which weights may change: the engine does not sample, and forgets its cached prompts."""
        serving = self.session.serving
        with serving.engine.paused() if serving else nullcontext(), self.policies.locked():
            yield

    def forget_prompts(self) -> None:
        """Clear the engine's prompt cache, as a run that resumes here would find it."""
        with self.weights_locked():
            pass

    def log(self, metrics: Mapping[str, float]) -> None:
        """Record the metrics of the current step of a phase."""
        assert self._metrics is not None, "no phase has begun"
        self._metrics.append(self.state.step, metrics)

    def _open_metrics(self) -> MetricsLog:
        first = self.state.step + 1
        config = self.config.model_dump(mode="json", exclude_none=True)
        trackers = open_trackers(self.train.report_to, self.run, self.folder, config, first)
        return MetricsLog(self.store, self.run, self.folder, first_step=first, trackers=trackers)

    def save(self) -> None:
        """Write a checkpoint of the current state."""
        checkpoints = self.folder / "checkpoints"
        save_checkpoint(checkpoints, self.checkpoint())
        prune(checkpoints, self.state.step)

    def checkpoint(self) -> Checkpoint:
        """The current state."""
        return self.state.to_checkpoint(self.policies, self.config, self.base)

    def publish(self) -> None:
        """Write each adapter that a step trained to `adapters/<role>@<n>`, register it in the store, and serve it."""
        versions = self.policies.versions
        untrained = [role for role, version in versions.items() if version == 0]
        if untrained:
            self.progress.note(f"no adapter is published of {', '.join(untrained)}: no step trained it")
        (self.folder / "adapters").mkdir(exist_ok=True)
        for role in (role for role in versions if role not in untrained):
            policy = self.policies.of(role)
            folder = self.folder / "adapters" / policy.version_name(role)
            save_adapter(folder, policy.adapter(role), policy.adapter_config(role))
            self.store.put_resource(Resource(adapter_name(self.run, role), versions[role], str(folder.resolve())))
        if self.session.serving is not None:
            self.session.serving.engine.make_live()

    def set_state(self, state: RunState) -> None:
        """Record in the store how far the training is, unless it was opened only to evaluate."""
        if self._trains:
            set_state(self.store, self.run, state)

    def close(self) -> None:
        if self._metrics is not None:
            self._metrics.close()
