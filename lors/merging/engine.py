"""Streams a recipe over checkpoints: tensor by tensor, large ones in row blocks, one thread a worker.

What is in memory does not grow with the number of experts: elementwise recipes hold a few blocks a worker, those with
a decomposition a few times the tensor at hand. Every number is computed by one thread from blocks that depend on the
tensor's shape alone, so the bytes are the same for any number of workers and any order of the experts.
"""

from __future__ import annotations

import functools
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch

from lors import delta_file
from lors.blocks import as_rows, row_blocks
from lors.checkpoint import Checkpoint
from lors.errors import CheckpointError, InputError
from lors.groups import unmatched
from lors.low_rank import load_lapack
from lors.merging import recipe as r
from lors.merging.combiners import Fold, Joint
from lors.merging.parts import combiner
from lors.merging.sparsify import Blocks, Keep, magnitude_of_model, trim
from lors.merging.spectral import star
from lors.prune import PrunedDelta, prune_delta
from lors.resources import cores
from lors.task_vector import TaskVector
from lors.workers import run_all, run_ordered

__all__ = ["Block", "Expert", "Merger", "Rows", "finished"]

Block = tuple[int, torch.Tensor, torch.Tensor]
"""The first row, the base's rows (float64), the merged delta's (float64 or float32)."""


class Rows(Protocol):
    """Rows [start, stop) of one expert's delta, float32.

    `base` is the same rows of the base, where the caller has them: where it is float64 and nothing was pruned, the
    delta is float64 too, and exact.
    """

    def __call__(self, start: int, stop: int, base: torch.Tensor | None = None) -> torch.Tensor: ...


Expert = TaskVector | delta_file.DeltaFile
"""A task vector that is read by tensor and by rows."""


class Merger:
    """The merged delta of a recipe, by tensor and by rows.

    Used as a context manager: a recipe that has to walk every expert several times keeps pruned experts on disk
    meanwhile, in `scratch`. Raises CheckpointError where an expert's tensors are not the base's, InputError where a
    group of the recipe names no parameter.
    """

    def __init__(
        self,
        base: Checkpoint,
        experts: Mapping[str, Expert],  # by id
        recipe: r.Recipe,
        weights: Mapping[str, float],  # by id
        *,
        workers: int | None = None,  # as many as there are usable cores where None
        scratch: Path | None = None,
    ) -> None:
        self.base, self.recipe = base, recipe
        self.experts = {expert: experts[expert] for expert in sorted(experts)}
        self.weights = [weights[expert] for expert in self.experts]
        self.workers = workers or cores()
        self._energies: dict[str, tuple[float, float]] = {}  # by expert: energy, error
        self._scratch, self._open = scratch, ExitStack()
        self._steps = list(recipe.steps)
        self._trims: dict[tuple[int, str], Mapping[str, Keep]] = {}
        self._lock = threading.Lock()
        self._largest = max(map(self.size, base.float_names), default=0)
        self._check()

    def _check(self) -> None:
        shapes = {name: self.base.shape(name) for name in self.base.float_names}
        if lost := unmatched(self.recipe.groups, shapes):
            raise InputError(
                f"no parameter of {self.base.label} belongs to the group {lost[0]!r}; "
                f"name a group of `lors merge --list` or write a pattern such as '*.fc1.weight'"
            )
        for expert, vector in self.experts.items():
            if odd := sorted({*vector.names} ^ {*self.base.float_names}):
                where = self.base.label if odd[0] in vector.names else f"the task vector {expert}"
                raise CheckpointError(f"{where} has no tensor {odd[0]}; give a task vector extracted from this base")
            for name, shape in shapes.items():
                if isinstance(vector, delta_file.DeltaFile) and vector.shape(name) != shape:
                    raise CheckpointError(
                        f"the tensor {name} is {list(vector.shape(name))} in {expert} but {list(shape)} in "
                        f"{self.base.label}; give a task vector extracted from this base"
                    )

    def __enter__(self) -> Merger:
        try:
            self._prepare()
        except BaseException:
            self._open.close()
            raise
        return self

    def _prepare(self) -> None:
        if self._decompositions() or not combiner(self.recipe.combine).elementwise:
            load_lapack()
        if self._model_trims() and (decomposed := [n for n in self._decompositions() if n < self._model_trims()[-1]]):
            self._spool(decomposed[-1] + 1)
        for number in self._model_trims():
            found = run_all(functools.partial(self._trim_model, number), [*self.experts], self.workers)
            self._trims.update({(number, expert): keeps for expert, keeps in zip(self.experts, found, strict=True)})

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def _model_trims(self) -> list[int]:
        return [n for n, step in enumerate(self._steps) if isinstance(step, r.Magnitude) and step.scope == "model"]

    def _decompositions(self) -> list[int]:
        return [n for n, step in enumerate(self._steps) if isinstance(step, r.Lors | r.Star)]

    def _spool(self, count: int) -> None:
        """Do every expert's first `count` steps once, onto the disk: what follows walks the whole expert repeatedly."""
        folder = Path(self._open.enter_context(tempfile.TemporaryDirectory(dir=self._scratch, prefix=".lors-")))

        def spool(expert: str) -> Expert:
            path = folder / f"{[*self.experts].index(expert)}.safetensors"
            pruned = ((name, self._pruned(expert, name, count)) for name in self.base.float_names)
            return delta_file.write(path, pruned, base_digest="", settings=None)

        self.experts = dict(zip(self.experts, run_all(spool, [*self.experts], self.workers), strict=True))
        del self._steps[:count]

    def _trim_model(self, number: int, expert: str) -> Mapping[str, Keep]:
        """What a trim over the whole task vector keeps of each tensor; tensors of another density are trimmed apart."""
        step = self._steps[number]
        assert isinstance(step, r.Magnitude)
        pools: dict[float, list[str]] = {}
        for name in self.base.float_names:
            if self.scaling(name):
                group = self.recipe.group(name, self.base.shape(name))
                pools.setdefault(r.with_group(step, group).density, []).append(name)
        kept: dict[str, Keep] = {}
        for density, names in pools.items():
            walks = {name: self._walk(self.rows(expert, name, number), name) for name in names}
            kept |= magnitude_of_model(walks, sum(map(self.size, names)), density, step.rescale, step.count)
        return kept

    def scaling(self, name: str, scaling: float | None = None) -> float:
        """The scaling coefficient of a parameter; 0 where its group is left out."""
        return self.recipe.scaling_of(name, self.base.shape(name), scaling)

    def blocks(self, name: str) -> Iterator[Block]:
        """A parameter block by block: the base's rows and the merged delta's, before the scaling coefficient."""
        shape = self.base.shape(name)
        how = combiner(r.with_group(self.recipe.combine, self.recipe.group(name, shape)))
        every = [functools.partial(self.rows, expert, name) for expert in self.experts]
        if how.elementwise and not self._decompositions():
            # Trims walk an expert several times: where all experts' deltas of a tensor are smaller than a part of the
            # largest tensor, they are read once and held.
            holds = self._steps and self.size(name) * len(self.experts) <= self._largest // 2
            held = self.base.rows(name, 0, shape[0] if shape else 1).float() if holds else None
            chains = [make(base=held) for make in every]
            for start, stop in row_blocks(shape):
                there = self.base.rows(name, start, stop) if held is None else held[start:stop]
                base = there.double()
                given = there.float() if self._steps else base
                deltas = _Lazy([functools.partial(rows, start, stop, given) for rows in chains])
                yield start, base, _combined(how, deltas, self.weights, base)
        elif isinstance(how, Fold):
            state = {array: torch.zeros(self.base.shape(name), dtype=torch.float64) for array in how.arrays}
            for make, weight in zip(every, self.weights, strict=True):
                rows = make()
                for start, stop in row_blocks(shape):
                    exact = None if self._steps else self.base.rows(name, start, stop).double()
                    part = {array: as_rows(state[array])[start:stop] for array in state}
                    how.add(part, rows(start, stop, exact), weight, 1)
            stored = lambda array, start, stop: as_rows(state[array])[start:stop]  # noqa: E731
            yield from finished(self.base, name, how, stored, self.weights)
        else:
            deltas = _Lazy([functools.partial(self._whole, make, name) for make in every])
            yield from _sliced(self.base, name, how.combine(deltas, self.weights, self.base.tensor(name)))

    def deltas(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, merged delta float32, before the scaling coefficient) for each of base.float_names; 0 if left out."""

        def whole(name: str) -> torch.Tensor:
            merged = torch.zeros(self.base.shape(name))
            for start, base, delta in self.blocks(name) if self.scaling(name) else ():
                as_rows(merged)[start : start + len(base)] = delta
            return merged

        return run_ordered(whole, self.base.float_names, self.workers, self.size, ahead=self.workers)

    def _whole(self, make: Callable[[], Rows], name: str) -> torch.Tensor:
        return self._gather(make(), name)

    def _gather(self, rows: Rows, name: str) -> torch.Tensor:
        """The whole tensor, float32, of what gives it by rows."""
        whole = torch.empty(self.base.shape(name))
        for start, stop in row_blocks(self.base.shape(name)):
            as_rows(whole)[start:stop] = rows(start, stop)
        return whole

    def _walk(self, rows: Rows, name: str) -> Blocks:
        return lambda: (rows(start, stop).float().reshape(-1) for start, stop in row_blocks(self.base.shape(name)))

    def _hold(self, rows: Rows, name: str) -> Blocks:
        """As `_walk`, for what walks more than once: the delta is computed at the first walk, and kept."""
        held: list[torch.Tensor] = []

        def walk() -> Iterator[torch.Tensor]:
            if not held:
                held.append(as_rows(self._gather(rows, name)))
            return (held[0][start:stop].reshape(-1) for start, stop in row_blocks(self.base.shape(name)))

        return walk

    def size(self, name: str) -> int:
        """Entries of a parameter."""
        return prod(self.base.shape(name))

    def rows(
        self,
        expert: str,
        name: str,
        count: int | None = None,
        base: torch.Tensor | None = None,  # the base's tensor, float32: the expert's is read whole then, and once
    ) -> Rows:
        """An expert's delta after its first `count` steps (all of them where None)."""
        vector, shape = self.experts[expert], self.base.shape(name)
        rows: Rows = functools.partial(_read, vector, name)
        if base is not None:
            rows = functools.partial(_slice, rows(0, len(base), base))
        group = self.recipe.group(name, shape)
        width = prod(shape[1:])
        for number, plain in enumerate(self._steps[:count]):
            step = r.with_group(plain, group)
            if isinstance(step, r.Lors):
                if not _was_pruned(vector):
                    pruned = self._account(expert, prune_delta(self._gather(rows, name), step, name))
                    rows = functools.partial(_stored, pruned)
            elif isinstance(step, r.Star):
                rows = functools.partial(_slice, star(self._gather(rows, name), step.eta))
            else:
                trims = self._trims.get((number, expert))
                keep = trims[name] if trims else trim(step, self._hold(rows, name), prod(shape), expert, name)
                rows = functools.partial(_kept, rows, keep, width)
        return rows

    def _pruned(self, expert: str, name: str, count: int) -> PrunedDelta:
        vector, step = (
            self.experts[expert],
            r.with_group(self._steps[0], self.recipe.group(name, self.base.shape(name))),
        )
        if count == 1 and isinstance(step, r.Lors) and not _was_pruned(vector):
            return self._account(expert, prune_delta(vector.delta(name), step, name))
        return PrunedDelta(self.base.shape(name), whole=self._gather(self.rows(expert, name, count), name))

    def _account(self, expert: str, pruned: PrunedDelta) -> PrunedDelta:
        with self._lock:
            energy, error = self._energies.get(expert, (0.0, 0.0))
            self._energies[expert] = energy + pruned.energy, error + pruned.error
        return pruned

    @property
    def retained_energy(self) -> dict[str, float]:
        """What LoRS kept of each expert that it pruned here, 0 to 1, by id."""
        found = sorted(self._energies.items())
        return {expert: 1.0 - error / energy if energy else 1.0 for expert, (energy, error) in found}


def finished(
    base: Checkpoint,
    name: str,
    how: Fold,
    stored: Callable[[str, int, int], torch.Tensor],  # (array, start, stop) -> these rows of the state
    weights: Sequence[float],
) -> Iterator[Block]:
    """What `Merger.blocks` gives, from a fold's state."""
    shape = base.shape(name)
    if how.elementwise:
        for start, stop in row_blocks(shape):
            rows = base.rows(name, start, stop).double()
            yield start, rows, how.finish({array: stored(array, start, stop) for array in how.arrays}, weights, rows)
    else:
        state = {array: stored(array, 0, shape[0] if shape else 1).reshape(shape) for array in how.arrays}
        yield from _sliced(base, name, how.finish(state, weights, base.tensor(name)))


def _sliced(base: Checkpoint, name: str, whole: torch.Tensor) -> Iterator[Block]:
    for start, stop in row_blocks(base.shape(name)):
        yield start, base.rows(name, start, stop).double(), as_rows(whole)[start:stop]


def _combined(how: Fold | Joint, deltas: Sequence[torch.Tensor], weights: Sequence[float], base: torch.Tensor) -> Any:
    if isinstance(how, Joint):
        return how.combine(deltas, weights, base)
    state = {array: torch.zeros_like(base) for array in how.arrays}
    for number, weight in enumerate(weights):
        how.add(state, deltas[number], weight, 1)
    return how.finish(state, weights, base)


def _was_pruned(vector: Expert) -> bool:
    """Whether it is a compact expert, which LoRS steps take as it is."""
    return isinstance(vector, delta_file.DeltaFile) and vector.settings is not None


def _kept(rows: Rows, keep: Keep, width: int, start: int, stop: int, base: torch.Tensor | None = None) -> torch.Tensor:
    delta = rows(start, stop, base).float()
    return keep(delta.reshape(-1), start * width).reshape(delta.shape)


def _read(vector: Expert, name: str, start: int, stop: int, base: torch.Tensor | None = None) -> torch.Tensor:
    return vector.rows(name, start, stop, base) if isinstance(vector, TaskVector) else vector.rows(name, start, stop)


def _stored(pruned: PrunedDelta, start: int, stop: int, base: torch.Tensor | None = None) -> torch.Tensor:
    return pruned.rows(start, stop)


def _slice(whole: torch.Tensor, start: int, stop: int, base: torch.Tensor | None = None) -> torch.Tensor:
    return as_rows(whole)[start:stop]


class _Lazy(Sequence[torch.Tensor]):
    """Tensors that are computed at each access."""

    def __init__(self, makers: Sequence[Callable[[], torch.Tensor]]) -> None:
        self._makers = makers

    def __len__(self) -> int:
        return len(self._makers)

    def __getitem__(self, index: Any) -> Any:
        return self._makers[index]()
