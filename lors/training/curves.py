"""The events of a training as TensorBoard's curves."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lors.errors import InputError

__all__ = ["tensorboard_writer"]


@contextlib.contextmanager
def tensorboard_writer(folder: Path) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Inside, the function that this yields draws every number of an event of `fine_tune` at the event's step.

    Raises InputError where the extra `tensorboard` is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError(
            f"TensorBoard's curves cannot be written to {folder}: install the extra, pip install 'lors[tensorboard]', "
            "or leave resources.tensorboard out"
        ) from error

    with SummaryWriter(str(folder)) as writer:

        def draw(event: Mapping[str, Any]) -> None:
            for name, value in event.items():
                if "step" in event and name not in _COUNTERS and isinstance(value, int | float):
                    writer.add_scalar(name, value, event["step"])

        yield draw


_COUNTERS = ("step", "done", "total")
