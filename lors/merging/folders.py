"""Merge model folders and delta files into one model folder: what `lors merge` does."""

from __future__ import annotations

import importlib.metadata
import threading
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from lors.blocks import row_blocks
from lors.checkpoint import Checkpoint
from lors.delta_file import DeltaFile
from lors.errors import CheckpointError, InputError
from lors.groups import unmatched
from lors.merging.engine import Expert, Merger
from lors.merging.recipe import Recipe
from lors.merging.registry import METHODS, expert_weights, make_recipe
from lors.model_writer import ModelWriter, model_writer
from lors.prune_settings import PruneSettings
from lors.resources import cores
from lors.task_vector import TaskVector, apply
from lors.workers import run_all

__all__ = [
    "MergeResult",
    "Progress",
    "card",
    "check_patterns",
    "merge_folders",
    "open_expert",
    "open_experts",
    "pruned_otherwise",
    "write_merged",
]

Blocks = Callable[[str], Iterator[tuple[int, torch.Tensor, torch.Tensor]]]
Progress = Callable[[int, int], None]
"""(parameters done, parameters in all)"""


@dataclass(frozen=True, slots=True)
class MergeResult:
    """What was merged, from what, and how long it took."""

    out: Path
    recipe: Recipe
    weights: dict[str, float]  # by expert
    parameters: int
    seconds: float
    base_digest: str
    expert_digests: dict[str, str]
    digest: str  # of the merged model
    retained_energy: dict[str, float]  # by expert; empty where nothing was pruned


def merge_folders(
    base: str | Path,
    experts: Mapping[str, str | Path],  # id -> model folder, Hugging Face id, or .safetensors delta file
    out: str | Path,
    recipe: Recipe | str = "lors",  # or a method's name, with its defaults
    *,
    weights: Mapping[str, float] | None = None,  # id -> merge weight, 1 where not given
    refuse_other_pruning: bool = False,  # raise where a delta file was pruned by other settings than the recipe's
    force: bool = False,  # take delta files that were extracted from another base
    memo: MutableMapping[str, str] | None = None,  # digests that are known, as in `lors.files.file_digest`
    workers: int | None = None,  # threads; as many as there are usable cores where None
    on_progress: Progress | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> MergeResult:
    """base + lambda * combine(steps(experts)), written to `out` as a complete model folder in the base's dtypes.

    A delta file that was pruned before is taken as it is. The same arguments give the same weights, byte for byte, for
    any number of workers and any order of the experts.
    Raises InputError (a bad setting, an `out` that cannot be written) or CheckpointError (a model that does not fit).
    """
    started = time.perf_counter()
    recipe = make_recipe(recipe) if isinstance(recipe, str) else recipe
    if not experts:
        raise InputError("no expert was given; give at least one expert to merge")
    each = expert_weights(experts, weights)
    model = Checkpoint(base)
    check_patterns(model, recipe.pruning)
    vectors, digests, base_digest = open_experts(model, experts, force=force, memo=memo, workers=workers)
    if refuse_other_pruning and (odd := pruned_otherwise(vectors, recipe)):
        raise InputError(
            f"{experts[odd[0]]} was pruned with other settings; "
            f"leave the pruning settings out (lors takes it as it is), or give the expert's model folder"
        )
    text, provenance = card(recipe, base_digest, digests, each)
    with (
        model_writer(Path(out), model, text=text, provenance=provenance, max_shard_bytes=max_shard_bytes) as writer,
        Merger(model, vectors, recipe, each, workers=workers, scratch=Path(out).absolute().parent) as merger,
    ):
        write_merged(writer, merger.blocks, merger.scaling, merger.workers, on_progress)
        retained = merger.retained_energy | {
            expert: vector.retained_energy
            for expert, vector in vectors.items()
            if isinstance(vector, DeltaFile) and vector.settings
        }
        provenance["retained_energy"] = retained
    return MergeResult(
        out=Path(out),
        recipe=recipe,
        weights=each,
        parameters=model.parameters,
        seconds=time.perf_counter() - started,
        base_digest=base_digest,
        expert_digests=digests,
        digest=writer.digest,
        retained_energy=retained,
    )


def card(
    recipe: Recipe, base_digest: str, digests: Mapping[str, str], weights: Mapping[str, float]
) -> tuple[str, dict[str, Any]]:
    """The text and the provenance of a merged model's card."""
    method = METHODS.get(recipe.method)
    about = f": {method.formula} ({method.reference})" if method else ""
    text = f"Merged from {len(digests)} experts by `{recipe.method}`{about}, scaling coefficient {recipe.scaling:g}."
    return text, {
        "base_digest": base_digest,
        "recipe": recipe.model_dump(mode="json"),
        "experts": {expert: {"digest": digests[expert], "weight": weights[expert]} for expert in sorted(digests)},
        "versions": {name: importlib.metadata.version(name) for name in ("lors", "torch", "numpy", "scipy")},
    }


def write_merged(
    writer: ModelWriter,
    blocks: Blocks,  # of a parameter: (start, the base's rows, the merged delta's rows)
    scaling: Callable[[str], float],  # of a parameter
    workers: int,
    on_progress: Progress | None = None,
) -> None:
    """Write base + scaling * delta for every float tensor."""
    base, done, lock = writer.base, 0, threading.Lock()
    names = base.float_names
    total = sum(prod(base.shape(name)) for name in names)

    def unchanged(name: str) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        for start, stop in row_blocks(base.shape(name)):
            rows = base.rows(name, start, stop)
            base.require_finite(name, rows)
            yield start, rows, rows

    def write(name: str) -> None:
        nonlocal done
        coefficient = scaling(name)
        for start, rows, delta in blocks(name) if coefficient else unchanged(name):
            writer.write(name, start, apply(rows, delta, coefficient))
            with lock:
                done += rows.numel()
                if on_progress:
                    on_progress(done, total)

    run_all(write, names, workers, lambda name: prod(base.shape(name)))


def open_experts(
    base: Checkpoint,
    experts: Mapping[str, str | Path],
    *,
    force: bool = False,
    memo: MutableMapping[str, str] | None = None,
    workers: int | None = None,
) -> tuple[dict[str, Expert], dict[str, str], str]:
    """Each expert and its digest by id, and the base's digest. Raises CheckpointError as `open_expert` does."""
    opened = {expert: open_expert(base, source) for expert, source in sorted(experts.items())}
    models = {"base": base, **{f"expert {expert}": vector for expert, vector in opened.items()}}
    digests = run_all(lambda name: _digest(models[name], memo), [*models], workers or cores())
    found = dict(zip(models, digests, strict=True))
    for expert, vector in opened.items():
        if isinstance(vector, DeltaFile) and vector.base_digest != found["base"] and not force:
            raise CheckpointError(
                f"{vector.path} was extracted from another base (digest {vector.base_digest[:12]}) "
                f"than {base.label} ({found['base'][:12]}); give that base, prune {expert} again, or force it"
            )
    return opened, {expert: found[f"expert {expert}"] for expert in opened}, found["base"]


def open_expert(base: Checkpoint, source: str | Path) -> Expert:
    """A model folder or Hugging Face id as a task vector, a .safetensors file as the delta file that it is."""
    if Path(source).suffix == ".safetensors":
        return DeltaFile(source)
    return TaskVector(base, Checkpoint(source))


def _digest(model: Expert | Checkpoint, memo: MutableMapping[str, str] | None) -> str:
    return (model.expert if isinstance(model, TaskVector) else model).digest(memo)


def pruned_otherwise(vectors: Mapping[str, Expert], recipe: Recipe) -> list[str]:
    """The experts that were pruned by other settings than the recipe's, or to a budget, whatever their settings."""
    return [
        expert
        for expert, vector in vectors.items()
        if isinstance(vector, DeltaFile)
        and vector.settings
        and recipe.pruning is not None
        and (vector.settings != recipe.pruning or vector.budget is not None)
    ]


def check_patterns(base: Checkpoint, settings: PruneSettings | None) -> None:
    """Raises InputError where a pattern of the pruning settings names no parameter of the base."""
    if settings is None:
        return
    shapes = {name: base.shape(name) for name in base.float_names}
    if lost := unmatched([*settings.include, *settings.exclude, *settings.groups], shapes):
        raise InputError(
            f"no parameter of {base.label} belongs to {lost[0]!r}, which the pruning settings name; "
            f"name a group of `lors merge --list` or write a pattern such as '*.fc1.weight'"
        )
