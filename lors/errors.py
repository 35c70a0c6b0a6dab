"""The errors a user meets: each is one sentence that names the thing, the cause and the next step."""

from __future__ import annotations

from lors.secrets import redact

__all__ = [
    "CheckpointError",
    "ConfigError",
    "CorpusError",
    "InputError",
    "LorsError",
    "StepFailedError",
    "TrainingError",
    "UnreachableError",
    "WorseError",
]


class LorsError(ValueError):
    """Base of every error LoRS raises on purpose; the command line prints it without a traceback (exit code 1).

    Its message goes to logs, to Prefect's server and to whom it notifies, so that secrets in it are replaced.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(redact(message))


class InputError(LorsError):
    """Something the user gave is wrong (exit code 2); running again without a change would fail the same way."""


class ConfigError(InputError):
    """The experiment file or a `--set` is wrong."""


class CheckpointError(InputError):
    """A model folder or a delta file is missing, incomplete, corrupt or of another architecture."""


class CorpusError(InputError):
    """A corpus is missing, empty, or has too many bad rows."""


class TrainingError(LorsError):
    """Fine-tuning cannot go on (the loss is not finite, the disk is full); the last checkpoint is kept."""


class StepFailedError(LorsError):
    """A step's process died (killed, out of memory); running again resumes it."""


class UnreachableError(StepFailedError):
    """The network, the hub or a server does not answer now; running again later may do."""


class WorseError(LorsError):
    """A new model loses more than the tolerance in a language; the old one stays."""
