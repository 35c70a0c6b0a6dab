"""How the experts' deltas of one tensor become one: the two shapes that a combiner can have."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Fold", "FoldAdd", "FoldFinish", "Joint"]

State = Mapping[str, "Tensor"]


class FoldAdd(Protocol):
    """Adds one expert to the state, in place; with sign -1 takes it out again."""

    def __call__(self, state: State, delta: Tensor, weight: float, sign: int) -> None: ...


class FoldFinish(Protocol):
    """The merged delta of a state; `weights` are those of the experts in it."""

    def __call__(self, state: State, weights: Sequence[float], base: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Fold:
    """A combiner that takes the experts one after the other, so that adding one never reads the others again.

    The state's arrays are float64 zeros of the tensor's shape at first; `delta` is float32 or float64 of that shape.
    Sums of float32 numbers are mostly exact in float64, so the order of the experts leaves no trace.
    """

    arrays: tuple[str, ...]
    add: FoldAdd
    finish: FoldFinish
    elementwise: bool = True
    """Whether `finish` may be given any rows of the tensor; else it needs them all."""
    removable: bool = True
    """Whether `add` knows sign -1."""


@dataclass(frozen=True, slots=True)
class Joint:
    """A combiner that needs the experts together. `deltas` is read lazily: each access may compute the delta anew."""

    combine: Callable[[Sequence[Tensor], Sequence[float], Tensor], Tensor]
    """(deltas float32, one merge weight each, the base's tensor) -> the merged delta."""
    elementwise: bool = False
    """Whether any rows of the tensor may be combined by themselves."""
