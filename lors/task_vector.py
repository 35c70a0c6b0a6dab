"""Task vectors: expert minus base, and back (Ilharco et al. 2023, arXiv 2212.04089, sec. 2)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch

from lors.blocks import as_rows, row_blocks
from lors.checkpoint import Checkpoint, check_compatible, is_finite
from lors.errors import CheckpointError

__all__ = ["Deltas", "TaskVector", "apply", "extract"]


class Deltas(Protocol):
    """A task vector that is read by tensor: a TaskVector, a DeltaFile."""

    names: tuple[str, ...]

    def delta(self, name: str) -> torch.Tensor: ...


class TaskVector:
    """Expert minus base over the float tensors of two checkpoints, one tensor at a time.

    Raises CheckpointError when the two do not fit together, or a tensor that is not float (a buffer) differs.
    """

    def __init__(self, base: Checkpoint, expert: Checkpoint) -> None:
        check_compatible(base, expert)
        for name in sorted({*base.names} - {*base.float_names}):
            if not torch.equal(base.tensor(name), expert.tensor(name)):
                raise CheckpointError(
                    f"the tensor {name} ({base.dtype(name)}) differs between {base.label} and {expert.label}, "
                    f"and only float tensors can be merged; give an expert that was fine-tuned from this base"
                )
        self.base, self.expert = base, expert
        self.names = base.float_names

    def delta(self, name: str) -> torch.Tensor:
        """Expert minus base, float32, in the tensor's shape. Raises CheckpointError where either is not finite."""
        shape = self.base.shape(name)
        delta = torch.empty(shape)
        for start, stop in row_blocks(shape):
            as_rows(delta)[start:stop] = self.rows(name, start, stop)
        return delta

    def rows(
        self,
        name: str,
        start: int,
        stop: int,
        base: torch.Tensor | None = None,  # these rows of the base, float32 or float64, where the caller has them
    ) -> torch.Tensor:
        """Rows [start, stop) of the delta's first dimension: float32, or float64 where `base` is.

        float64 is exact where base and expert, float32 or narrower, are within a factor of 2^29. Raises as `delta`.
        """
        base = self.base.rows(name, start, stop).float() if base is None else base
        delta = self.expert.rows(name, start, stop).to(base.dtype).sub_(base)
        if not is_finite(delta):
            self.base.require_finite(name, base)
            self.expert.require_finite(name, delta)
        return delta


def extract(base: Checkpoint, expert: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, delta float32) for each of base.float_names, in that order. Raises as `TaskVector` does."""
    vector = TaskVector(base, expert)
    return ((name, vector.delta(name)) for name in vector.names)


def apply(
    base: torch.Tensor,  # any shape, any float dtype
    tau: torch.Tensor,  # same shape, float32 or float64: a delta, or several merged
    scaling: float,  # the scaling coefficient lambda
) -> torch.Tensor:
    """base + scaling * tau, computed in float64 and cast once to the base's dtype.

    Scaling 0 returns the base itself, bit for bit (the sum would turn -0.0 into 0.0).
    """
    if scaling == 0:
        return base
    return tau.double().mul(scaling).add_(base).to(base.dtype)
