"""Task vectors: expert minus base, and back (Ilharco et al. 2023, arXiv 2212.04089, sec. 2)."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lors.checkpoint import Checkpoint, check_compatible, is_finite
from lors.errors import CheckpointError

__all__ = ["TaskVector", "apply", "extract"]


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
        base, expert = self.base.tensor(name), self.expert.tensor(name)
        wide = torch.promote_types(torch.promote_types(base.dtype, expert.dtype), torch.float32)
        delta = (expert.to(wide) - base.to(wide)).float()
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
    tau: torch.Tensor,  # same shape, float32: a delta, or several merged
    scaling: float,  # the scaling coefficient lambda
) -> torch.Tensor:
    """base + scaling * tau, computed in float32 (float64 for a float64 base) and cast once to the base's dtype.

    Scaling 0 returns the base itself, bit for bit (the sum would turn -0.0 into 0.0).
    """
    if scaling == 0:
        return base
    wide = torch.promote_types(base.dtype, torch.float32)
    return torch.add(base.to(wide), tau, alpha=scaling).to(base.dtype)
