"""Error classes: one root, and one class for each boundary at which something can fail.

A message says what was got, what was expected, for which rollout, role or row, and what to do. The CLI prints the
message without a traceback and exits with 2; a traceback is a sign of a defect of ours.
"""


class AglError(Exception):
    """Base class of all errors that are raised deliberately."""

    exit_code = 2
    """Of a command that ends with it: 2 if the command could not run, 1 if it ran and found a problem."""


class ConfigError(AglError):
    """The configuration names an unknown key, a wrong value, or something that cannot be loaded."""


class TelemetryError(AglError):
    """A rollout, role, reward or other value cannot be recorded on a span. Nothing of it was recorded."""


class StoreError(AglError):
    """The store cannot be opened or cannot execute a verb."""


class QueueError(StoreError):
    """The queue in front of the store cannot be reached, is full, or is not durable."""


class InputError(StoreError):
    """The store can never accept the input, so repeating the call is of no use."""


class RefusedError(StoreError):
    """The server of the store does not let this client do it, e.g. for want of a token. Repeating it is of no use."""


class DamageError(StoreError):
    """What the store has is not what it acknowledged. Repeating the call is of no use."""


class FolderError(StoreError):
    """Files of the store cannot be written to a folder of this machine."""


class UnknownIdError(StoreError):
    """A verb names a rollout, an attempt or a version that is not in the store."""


class TransitionError(StoreError):
    """The state table does not allow the change from the state of the rollout or attempt."""


class OtlpError(AglError):
    """An OTLP body cannot be decoded; none of its spans was stored."""


class TrajectoryError(AglError):
    """The spans are not those of exactly one rollout."""


class RewardError(AglError):
    """A scorer cannot be built, or has no reward for an answer: that reward is missing, and never counts as 0."""


class CommandError(AglError):
    """The arguments of a command name something that does not exist or cannot be used."""


class GatewayError(AglError):
    """The gateway cannot answer a request: there is no engine, the engine failed, or the request is invalid."""


class CanaryError(AglError):
    """A canary cannot start or be decided: its versions are wrong, another one runs, or a reward is out of range."""


class AgentError(AglError):
    """An agent function raised or timed out. It is data: the rollout is marked as failed with it."""


class RunnerError(AglError):
    """A runner cannot go on: store or collector have been away for too long, or its processes keep ending."""


class TrainingError(AglError):
    """A batch, a loss or a checkpoint is invalid; the message names the rollout, role or file."""


class NothingTrainedError(TrainingError):
    """A training ran, and no call of its steps, or of its last steps, trained; the message has the reasons."""

    exit_code = 1
