"""The merging methods as data: each with its formula, its paper and one pure function."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from math import isfinite
from typing import TYPE_CHECKING, Protocol

from lors.errors import CheckpointError, InputError

if TYPE_CHECKING:
    from torch import Tensor

    from lors.checkpoint import Checkpoint

__all__ = ["METHODS", "Deltas", "Method", "combine_files", "expert_weights", "get_method", "register", "weighted_sum"]


@dataclass(frozen=True, slots=True)
class Method:
    """How the experts' deltas of one tensor become one."""

    name: str
    formula: str
    reference: str
    combine: Callable[[Sequence[Tensor], Sequence[float]], Tensor]
    """(deltas, each of one shape and float32; one weight each) -> the merged delta, before the scaling coefficient."""
    prunes: bool
    """Whether the deltas are pruned by LoRS first."""
    scaling_default: float
    """The scaling coefficient where there is no validation data to search it on."""
    searches_scaling: bool
    """Whether the scaling coefficient is searched where there is validation data."""


class Deltas(Protocol):
    """A task vector read by tensor: a DeltaFile, a TaskVector."""

    names: tuple[str, ...]

    def delta(self, name: str) -> Tensor: ...


METHODS: dict[str, Method] = {}
"""Every method by name, in the order of its name; filled by `register` as `lors.merging` is imported."""


def register(method: Method) -> Method:
    assert method.name not in METHODS, f"two methods named {method.name}"
    METHODS[method.name] = method
    return method


def get_method(name: str) -> Method:
    """Raises InputError, with the nearest name, where there is no such method."""
    if name not in METHODS:
        near = get_close_matches(name, METHODS, n=1, cutoff=0)
        raise InputError(
            f"there is no merging method {name!r}; did you mean {near[0]}? (there are: {', '.join(METHODS)})"
        )
    return METHODS[name]


def expert_weights(experts: Mapping[str, object], weights: Mapping[str, float] | None) -> dict[str, float]:
    """One weight an expert, sorted by id; 1 where none is given. Raises InputError for an id that is no expert's."""
    weights = weights or {}
    if unknown := sorted(weights.keys() - experts.keys()):
        raise InputError(
            f"the weight of {unknown[0]!r} belongs to no expert; the experts are {', '.join(sorted(experts))}"
        )
    if bad := sorted(name for name, weight in weights.items() if not isfinite(weight)):
        raise InputError(f"the weight of {bad[0]!r} is {weights[bad[0]]}; give a finite number")
    return {name: float(weights.get(name, 1.0)) for name in sorted(experts)}


def combine_files(
    base: Checkpoint,
    experts: Mapping[str, Deltas],  # id -> task vector
    method: Method,
    weights: Mapping[str, float] | None = None,
) -> Iterator[tuple[str, Tensor]]:  # (name, merged delta float32) for each of base.float_names, in that order
    """Combine task vectors one tensor at a time, in the order of the experts' ids, whatever the order given.

    Raises CheckpointError where an expert's tensors are not the base's.
    """
    each = expert_weights(experts, weights)
    for expert in each:
        if odd := sorted({*experts[expert].names} ^ {*base.float_names}):
            where = base.label if odd[0] in experts[expert].names else f"the task vector {expert}"
            raise CheckpointError(f"{where} has no tensor {odd[0]}; give a task vector extracted from this base")
    for name in base.float_names:
        deltas = [experts[expert].delta(name) for expert in each]
        for expert, delta in zip(each, deltas, strict=True):
            if tuple(delta.shape) != base.shape(name):
                raise CheckpointError(
                    f"the tensor {name} is {list(delta.shape)} in {expert} "
                    f"but {list(base.shape(name))} in {base.label}; give a task vector extracted from this base"
                )
        yield name, method.combine(deltas, list(each.values()))


def weighted_sum(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum of w_i * delta_i, added in the order given, float32."""
    total = deltas[0] * weights[0]
    for delta, weight in zip(deltas[1:], weights[1:], strict=True):
        total.add_(delta, alpha=weight)
    return total
