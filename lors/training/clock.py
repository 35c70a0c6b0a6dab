"""How far a training is, by steps or by time, and how fast."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from lors.training.checkpoint import Progress
from lors.training.settings import Finetune

__all__ = ["Clock", "finished", "steps_done"]


def steps_done(settings: Finetune, progress: Progress) -> float:
    """Finished steps, or those that the time used so far stands for, if more."""
    share = 0.0 if settings.max_hours is None else progress.seconds / (3600 * settings.max_hours)
    return min(settings.steps, max(progress.step, share * settings.steps))


def finished(settings: Finetune, progress: Progress) -> bool:
    """Whether all steps or all time are used, or validation after validation gave nothing better."""
    patience = settings.validation and settings.validation.patience
    return steps_done(settings, progress) >= settings.steps or bool(patience and progress.without_better >= patience)


@dataclass(slots=True)
class Clock:
    """How fast this run of a training is; validations and checkpoints count as training, but not as its speed."""

    settings: Finetune
    progress: Progress
    _started: float = field(default_factory=lambda: time.monotonic())
    _before: float = field(init=False)
    _first: float = field(init=False)
    _step: float = 0.0
    _waited: float = 0.0
    _worked: float = 0.0
    _samples: int = 0

    def __post_init__(self) -> None:
        self._before, self._first = self.progress.seconds, steps_done(self.settings, self.progress)

    def seconds(self) -> float:
        """Of the whole training, the runs before a resume included."""
        return self._before + time.monotonic() - self._started

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """A step begins with waiting for its input."""
        self._step = time.monotonic()
        yield
        self._waited += time.monotonic() - self._step

    def tick(self, samples: int) -> dict[str, float]:
        """A step ends; the figures for its event."""
        self._worked += time.monotonic() - self._step
        self._samples += samples
        done = steps_done(self.settings, self.progress)
        remaining = (self.settings.steps - done) * (self.seconds() - self._before) / max(done - self._first, 1e-9)
        return {"samples_per_second": self._speed(), "remaining_seconds": round(remaining, 1)}

    def figures(self) -> dict[str, float]:
        """For the result; `input_share` is the share of the steps' time in which they waited for their input."""
        share = self._waited / max(self._worked, 1e-9)
        return {
            "seconds": round(self.progress.seconds, 2),
            "samples_per_second": self._speed(),
            "input_share": round(share, 4),
        }

    def _speed(self) -> float:
        return round(self._samples / max(self._worked, 1e-9), 2)
