"""A checkpoint pruned to a compact expert: what `lors prune` does."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path

from lors.budget import dtype_for, fit_budget, room_to_prune
from lors.checkpoint import Checkpoint
from lors.delta_file import DeltaFile, write
from lors.errors import InputError
from lors.low_rank import load_lapack
from lors.merging.folders import Progress, check_patterns, open_experts
from lors.prune import Dtype, PrunedDelta, PruneSettings, prune_delta
from lors.prune_settings import parse_size
from lors.resources import cores
from lors.workers import run_ordered, run_unordered

__all__ = ["prune_expert"]


def prune_expert(
    base: str | Path,
    expert: str | Path,  # model folder, Hugging Face id, or a delta file that was not pruned
    out: str | Path,
    settings: PruneSettings | None = None,
    *,
    dtype: Dtype | None = None,  # of what is stored; None: float32, or what keeps most energy in the budget
    budget: int | str | None = None,  # bytes, or a size such as 20MB: ranks and densities by energy, not by settings
    workers: int | None = None,  # threads; as many as there are usable cores where None
    on_progress: Progress | None = None,
) -> DeltaFile:
    """LoRS on the task vector of one expert, written as one compact file; the same bytes for any number of workers.

    Raises InputError (a budget too small, an `out` that cannot be written) or CheckpointError (a model that does not
    fit the base, a delta file that was pruned before).
    """
    out, model = Path(out), Checkpoint(base)
    if out.suffix != ".safetensors":
        raise InputError(f"{out} is no name for a compact expert; let it end in .safetensors")
    if out.exists():
        raise InputError(f"{out} is already there; choose another file or remove it")
    room = parse_size(budget) if isinstance(budget, str) else budget
    check_patterns(model, settings)
    vectors, digests, base_digest = open_experts(model, {"expert": expert}, workers=workers)
    vector = vectors["expert"]
    if isinstance(vector, DeltaFile) and vector.settings is not None:
        raise InputError(f"{expert} was pruned before; give the model folder that it was made of")
    settings, workers = settings or PruneSettings(), workers or cores()
    if dtype is None:
        dtype = "float32" if room is None else dtype_for(room, model.parameters)
    if room is not None:
        room_to_prune({name: model.shape(name) for name in model.float_names}, room, settings, dtype)
    total, done = sum(prod(model.shape(name)) for name in model.float_names), 0
    passes = 1 if room is None else 2

    def size(name: str) -> int:
        return prod(model.shape(name))

    def report(more: int) -> None:
        nonlocal done
        done += more
        if on_progress:
            on_progress(done, passes * total)

    plan = None
    load_lapack()
    if room is not None:
        deltas = run_ordered(vector.delta, model.float_names, workers, size, ahead=1)
        plan = fit_budget(deltas, room, settings, dtype, on_progress=lambda parameters: report(parameters - done))

    def prune(name: str) -> PrunedDelta:
        return prune_delta(vector.delta(name), settings, name, dtype, plan)

    def pruned() -> Iterator[tuple[str, PrunedDelta]]:
        for name, delta in run_unordered(prune, model.float_names, workers, size):
            yield name, delta
            report(size(name))

    provenance = {"base": model.label, "expert_digest": digests["expert"], "budget": room}
    return write(out, pruned(), base_digest=base_digest, settings=settings, provenance=provenance)
