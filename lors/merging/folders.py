"""Merge model folders and delta files into one model folder, tensor by tensor: what `lors merge` does."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

import torch

from lors.checkpoint import Checkpoint, write_model_folder
from lors.delta_file import DeltaFile
from lors.errors import CheckpointError, InputError
from lors.merging.registry import Deltas, Method, combine_files, expert_weights, get_method
from lors.prune import PruneSettings, prune_delta
from lors.task_vector import TaskVector, apply

__all__ = ["MergeResult", "merge_folders", "merged_tensors"]


@dataclass(frozen=True, slots=True)
class MergeResult:
    """What was merged, from what, and how long it took."""

    out: Path
    method: str
    scaling: float
    weights: dict[str, float]  # by expert
    parameters: int
    seconds: float
    base_digest: str
    expert_digests: dict[str, str]
    digest: str  # of the merged model
    retained_energy: dict[str, float]  # by expert; empty where nothing was pruned


class _Pruned:
    """A task vector pruned as it is read, with a running account of the energy."""

    def __init__(self, vector: Deltas, settings: PruneSettings) -> None:
        self.names = vector.names
        self._vector, self.settings = vector, settings
        self._energy = self._error = 0.0

    def delta(self, name: str) -> torch.Tensor:
        pruned = prune_delta(self._vector.delta(name), self.settings, name)
        self._energy += pruned.energy
        self._error += pruned.error
        return pruned.dense()

    @property
    def retained_energy(self) -> float:
        return 1.0 - self._error / self._energy if self._energy else 1.0


def merge_folders(
    base: str | Path,
    experts: Mapping[str, str | Path],  # id -> model folder, Hugging Face id, or .safetensors delta file
    out: str | Path,
    *,
    method: str = "lors",
    prune: PruneSettings | None = None,  # for a method that prunes; its defaults where None
    scaling: float | None = None,  # the scaling coefficient; the method's default where None
    weights: Mapping[str, float] | None = None,  # id -> merge weight, 1 where not given
    on_progress: Callable[[int, int], None] | None = None,  # (parameters done, parameters in all)
    max_shard_bytes: int = 5_000_000_000,
) -> MergeResult:
    """base + scaling * combine(experts), written to `out` as a complete model folder in the base's dtypes.

    A delta file that was pruned before is taken as it is. The same arguments give the same weights, byte for byte.
    Raises InputError (a bad setting, an `out` that cannot be written) or CheckpointError (a model that does not fit).
    """
    started = time.perf_counter()
    chosen = get_method(method)
    if not experts:
        raise InputError("no expert was given; give at least one expert to merge")
    if prune is not None and not chosen.prunes:
        raise InputError(
            f"the method {method} does not prune, so pruning settings have no effect; use lors, or leave them out"
        )
    scaling = chosen.scaling_default if scaling is None else scaling
    if not isfinite(scaling):
        raise InputError(f"the scaling coefficient is {scaling}; give a finite number")
    each = expert_weights(experts, weights)
    model = Checkpoint(base)
    base_digest = model.digest()
    vectors: dict[str, Deltas] = {}
    digests: dict[str, str] = {}
    for expert in each:
        vectors[expert], digests[expert] = _open_expert(model, base_digest, expert, experts[expert], chosen, prune)
    merged = merged_tensors(model, vectors, chosen, each, scaling)
    written = write_model_folder(
        Path(out),
        model,
        _reporting(merged, sum(torch.Size(model.shape(name)).numel() for name in model.float_names), on_progress),
        text=f"Merged from {len(each)} experts by `{method}`: {chosen.formula} ({chosen.reference}).",
        provenance={
            "base_digest": base_digest,
            "method": method,
            "scaling": scaling,
            "experts": {expert: {"digest": digests[expert], "weight": each[expert]} for expert in each},
            "prune": {expert: _settings(vectors[expert]) for expert in each},
        },
        max_shard_bytes=max_shard_bytes,
    )
    return MergeResult(
        out=Path(out),
        method=method,
        scaling=scaling,
        weights=each,
        parameters=written.parameters,
        seconds=time.perf_counter() - started,
        base_digest=base_digest,
        expert_digests=digests,
        digest=written.digest(),
        retained_energy={
            expert: vector.retained_energy
            for expert, vector in vectors.items()
            if isinstance(vector, _Pruned) or (isinstance(vector, DeltaFile) and vector.settings)
        },
    )


def merged_tensors(
    base: Checkpoint,
    experts: Mapping[str, Deltas],
    method: Method,
    weights: Mapping[str, float] | None,
    scaling: float,
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, merged tensor in the base's dtype) for each of base.float_names: what `write_model_folder` takes."""
    for name, delta in combine_files(base, experts, method, weights):
        yield name, apply(base.tensor(name), delta, scaling)


def _open_expert(
    base: Checkpoint, base_digest: str, expert: str, source: str | Path, method: Method, prune: PruneSettings | None
) -> tuple[Deltas, str]:
    if Path(source).suffix != ".safetensors":
        model = Checkpoint(source)
        vector: Deltas = TaskVector(base, model)
        return _Pruned(vector, prune or PruneSettings()) if method.prunes else vector, model.digest()
    file = DeltaFile(source)
    if file.base_digest != base_digest:
        raise CheckpointError(
            f"{source} was extracted from another base (digest {file.base_digest[:12]}) "
            f"than {base.label} ({base_digest[:12]}); give that base, or extract the expert {expert} again"
        )
    if file.settings is None and method.prunes:
        return _Pruned(file, prune or PruneSettings()), file.digest()
    if prune is not None and file.settings != prune:
        raise InputError(
            f"{source} was pruned with other settings; "
            f"leave the pruning settings out, or give the expert's model folder"
        )
    return file, file.digest()


def _settings(vector: Deltas) -> object:
    settings = getattr(vector, "settings", None)
    return settings.model_dump(mode="json") if settings else None


def _reporting(
    tensors: Iterator[tuple[str, torch.Tensor]], total: int, on_progress: Callable[[int, int], None] | None
) -> Iterator[tuple[str, torch.Tensor]]:
    done = 0
    for name, tensor in tensors:
        yield name, tensor
        done += tensor.numel()
        if on_progress:
            on_progress(done, total)
