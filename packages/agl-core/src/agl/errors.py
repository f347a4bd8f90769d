"""The error model: one root, one class for each boundary that can refuse something.

A message says what was got, what was expected, for which rollout, role or row, and what to do next. The CLI prints
the message alone and exits with 2; a traceback is for our own defects only.
"""


class AglError(Exception):
    """Root of every error raised on purpose."""


class ConfigError(AglError):
    """The configuration names an unknown key, a wrong value, or something that cannot be loaded."""


class TelemetryError(AglError):
    """A rollout, role, reward or other value that a span cannot carry; raised before anything was recorded."""


class StoreError(AglError):
    """The store cannot be opened, cannot keep what it was given, or refuses a verb (an unknown id)."""


class QueueError(StoreError):
    """The queue before the store cannot be reached, is full, or may lose what it acknowledges."""


class InputError(StoreError):
    """A store was given what it can never keep; to send it again is of no use."""


class UnknownIdError(StoreError):
    """A verb names a rollout or an attempt that the store does not hold."""


class TransitionError(StoreError):
    """A rollout or an attempt is in a state from which the state table does not allow the change."""


class OtlpError(AglError):
    """An OTLP body could not be decoded; nothing of it was stored."""


class TrajectoryError(AglError):
    """Spans that cannot be read as one rollout."""


class CommandError(AglError):
    """A command was asked for something that is not there, or names a file, port or plug-in it cannot use."""


class GatewayError(AglError):
    """The gateway cannot answer: no engine, an engine that fails, a request it cannot read."""


class AgentError(AglError):
    """An agent function failed or did not answer in time. It is data: the rollout is marked failed with it."""


class TrainingError(AglError):
    """A batch, a loss or a checkpoint that cannot be right; the message names the rollout, role or file."""
