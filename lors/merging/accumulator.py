"""Merging one expert at a time: the state of a fold in a file, so that no other expert is ever read again.

The state is float64 sums. Where the deltas at an entry are within a factor of 2^26 of one another and the merge weights
are powers of two (1, the default, is one), these sums are exact, and what is written is byte for byte what merging all
experts at once gives, in whatever order they came and after whatever was taken out again. Elsewhere the two differ by
at most N * 2^-53 of the largest |w_i * delta_i| before the one cast at the end.
"""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from lors.blocks import row_blocks
from lors.checkpoint import Checkpoint
from lors.errors import CheckpointError, InputError, StepFailedError
from lors.files import sync_to_disk, writing
from lors.lease import Lease, hold
from lors.merging.combiners import Fold
from lors.merging.engine import Block, Merger, finished
from lors.merging.folders import Progress, card, check_patterns, open_experts, write_merged
from lors.merging.parts import combiner
from lors.merging.recipe import Recipe, with_group
from lors.merging.registry import METHODS, expert_weights, with_scaling
from lors.model_writer import model_writer
from lors.resources import cores
from lors.tensor_file import TensorFile, read_header, read_rows
from lors.workers import run_all

__all__ = ["Accumulator", "accumulate", "write_accumulated"]

FORMAT, VERSION = "lors.accumulator", 1

_logger = logging.getLogger(__name__)


class Accumulator:
    """Experts merged so far. Raises CheckpointError: missing, corrupt, or no accumulator of a version known here."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        metadata, self._entries = read_header(self.path)
        try:
            facts = json.loads(metadata.get("lors", "{}"))
            if (facts.get("format"), facts.get("version")) != (FORMAT, VERSION):
                raise ValueError("it is another file or of another version")
            self.recipe = Recipe.model_validate(facts["recipe"])
            self.base_digest, self.base = str(facts["base_digest"]), str(facts["base"])
            self.experts: dict[str, dict[str, Any]] = facts["experts"]
        except (ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
            raise CheckpointError(
                f"{self.path} is no accumulator of version {VERSION} ({error}); begin a new one under another name"
            ) from error

    @property
    def weights(self) -> dict[str, float]:
        """The merge weight of every expert in it, by id."""
        return {expert: float(self.experts[expert]["weight"]) for expert in sorted(self.experts)}

    def rows(self, name: str, array: str, start: int, stop: int) -> torch.Tensor:
        """Rows of one array of a parameter's state, float64."""
        return read_rows(self._entries[f"{name}/{array}"], start, stop)

    def blocks(self, base: Checkpoint, name: str) -> Iterator[Block]:
        """What `Merger.blocks` gives of these experts."""
        how = fold_of(self.recipe, name, base.shape(name))
        yield from finished(base, name, how, lambda *place: self.rows(name, *place), [*self.weights.values()])


def fold_of(recipe: Recipe, name: str, shape: tuple[int, ...]) -> Fold:
    """The fold of one parameter. Raises InputError where the recipe needs all experts together."""
    how = combiner(with_group(recipe.combine, recipe.group(name, shape)))
    if not isinstance(how, Fold):
        able = ", ".join(name for name, method in METHODS.items() if isinstance(combiner(method.combine), Fold))
        raise InputError(
            f"{recipe.method} needs all experts together, so it cannot be merged one expert at a time; "
            f"merge them at once, or take one of {able}"
        )
    return how


def accumulate(
    path: str | Path,
    base: Checkpoint,
    recipe: Recipe,  # of the accumulator that is there, where there is one
    *,
    add: Mapping[str, str | Path] | None = None,  # id -> model folder, hub id or delta file
    remove: Mapping[str, str | Path | None] | None = None,  # id -> the same; None where it still lies where it was
    weights: Mapping[str, float] | None = None,  # of the added
    force: bool = False,  # take delta files that were extracted from another base
    workers: int | None = None,
    on_progress: Progress | None = None,
) -> Accumulator:
    """Add experts to an accumulator, or take them out; it is replaced in one rename, or stays as it was.

    Waits where another process is changing it. Reads the accumulator and the experts named, nothing else.
    Raises InputError (an id twice or unknown, another recipe, a method that needs all experts together or cannot take
    one out, no room) or CheckpointError (another base, another expert).
    """
    path = Path(path)
    lock = path.with_name(f".{path.name}.lock")
    with ExitStack() as held:
        with writing(path):
            lease = held.enter_context(hold(lock, f"the accumulator {path}", on_wait=_logger.warning))
        try:
            return _accumulate(
                path, base, recipe, dict(add or {}), dict(remove or {}), weights, force, workers, on_progress, lease
            )
        finally:
            with suppress(StepFailedError):  # the file is another's then
                lease.check()
                lock.unlink(missing_ok=True)


def _accumulate(
    path: Path,
    base: Checkpoint,
    recipe: Recipe,
    add: Mapping[str, str | Path],
    remove: Mapping[str, str | Path | None],
    weights: Mapping[str, float] | None,
    force: bool,
    workers: int | None,
    on_progress: Progress | None,
    lease: Lease,
) -> Accumulator:
    old = Accumulator(path) if path.exists() else None
    if old and old.recipe != recipe:
        raise InputError(f"{path} was begun with another recipe, of {old.recipe.method}; begin a new accumulator")
    experts = dict(old.experts) if old else {}
    each = expert_weights(add, weights)
    for expert in add:
        if expert in experts and expert not in remove:
            raise InputError(
                f"the expert {expert!r} is in {path} already; leave it out, or take the old one out with "
                f"--remove {expert} as well"
            )
    for expert in remove:
        if expert not in experts:
            raise InputError(
                f"there is no expert {expert!r} in {path} (there are: {', '.join(sorted(experts)) or 'none'})"
            )
    gone = {expert: source or experts[expert]["source"] for expert, source in remove.items()}
    for expert, place in gone.items():
        if remove[expert] is None and Path(place).is_absolute() and not Path(place).exists():
            raise InputError(
                f"the expert {expert!r} is no longer at {place}; say where it is now with --remove {expert}=MODEL"
            )
    check_patterns(base, recipe.pruning)
    leaving, left, base_digest = open_experts(base, gone, force=force, workers=workers)
    coming, come, _ = open_experts(base, add, force=force, workers=workers)
    if old and old.base_digest != base_digest:
        raise CheckpointError(
            f"{path} is of another base (digest {old.base_digest[:12]}) than {base.label} ({base_digest[:12]}); "
            f"give that base, or begin a new accumulator"
        )
    old_weights = {}
    for expert in remove:
        if left[expert] != experts[expert]["digest"]:
            raise CheckpointError(
                f"the expert {expert} at {gone[expert]} is not the one in {path} "
                f"(digest {left[expert][:12]}, not {experts[expert]['digest'][:12]}); give that one"
            )
        old_weights[expert] = float(experts.pop(expert)["weight"])
    for expert, source in add.items():
        place = str(Path(source).absolute()) if Path(source).exists() else str(source)
        experts[expert] = {"digest": come[expert], "weight": each[expert], "source": place}
    facts = {
        "format": FORMAT,
        "version": VERSION,
        "base": base.hub_id or str(base.folder.absolute()),
        "base_digest": base_digest,
        "recipe": recipe.model_dump(mode="json"),
        "experts": experts,
    }
    scratch = path.absolute().parent
    # The state is what comes before the scaling coefficient, which may change: one of 0 leaves nothing out of it.
    steps = with_scaling(recipe, 1.0)
    with (
        Merger(base, leaving, steps, old_weights, workers=workers, scratch=scratch) as minus,
        Merger(base, coming, steps, each, workers=workers, scratch=scratch) as plus,
    ):
        _write(path, [(minus, -1), (plus, 1)], old, facts, on_progress, lease)
    return Accumulator(path)


def write_accumulated(
    state: Accumulator,
    base: Checkpoint,
    out: Path,
    *,
    scaling: float | None = None,  # the recipe's where None
    workers: int | None = None,
    on_progress: Progress | None = None,
) -> None:
    """The merged model of an accumulator's experts, as `merge_folders` writes it; no expert is read.

    Without any expert it is the base. Raises CheckpointError (another base), and as `merge_folders` does.
    """
    recipe = with_scaling(state.recipe, scaling)
    if state.base_digest != base.digest():
        raise CheckpointError(f"{state.path} is of another base than {base.label}; give the base it was begun with")
    text, provenance = card(
        recipe, state.base_digest, {i: str(e["digest"]) for i, e in state.experts.items()}, state.weights
    )
    with model_writer(Path(out), base, text=text, provenance=provenance) as writer:
        write_merged(
            writer,
            lambda name: state.blocks(base, name),
            lambda name: recipe.scaling_of(name, base.shape(name)) if state.experts else 0.0,
            workers or cores(),
            on_progress,
        )


def _write(
    path: Path,
    changes: Sequence[tuple[Merger, int]],  # the experts that leave (-1), those that come (1)
    old: Accumulator | None,
    facts: Mapping[str, Any],
    on_progress: Progress | None,
    lease: Lease,
) -> None:
    merger = changes[0][0]
    base, recipe = merger.base, merger.recipe
    folds = {name: fold_of(recipe, name, base.shape(name)) for name in base.float_names if merger.scaling(name)}
    if merger.experts and not all(how.removable for how in folds.values()):
        raise InputError(f"{recipe.method} cannot take an expert out again; merge the others anew")
    arrays = {
        f"{name}/{array}": (torch.float64, base.shape(name)) for name, how in folds.items() for array in how.arrays
    }
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    with writing(path):
        try:
            file = TensorFile(partial, arrays, {"lors": json.dumps(facts, sort_keys=True)})
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    done = 0

    def update(name: str) -> None:
        nonlocal done
        chains = [
            (each.rows(expert, name), weight, sign)
            for each, sign in changes
            for expert, weight in zip(each.experts, each.weights, strict=True)
        ]
        for start, stop in row_blocks(base.shape(name)):
            rows = base.rows(name, start, stop).double()
            state = {
                array: old.rows(name, array, start, stop) if old else torch.zeros_like(rows)
                for array in folds[name].arrays
            }
            for chain, weight, sign in chains:
                folds[name].add(state, chain(start, stop, rows), weight, sign)
            for array, tensor in state.items():
                file.write(f"{name}/{array}", start, tensor)
        done += 1
        if on_progress:
            on_progress(done, len(folds))

    try:
        run_all(update, [*folds], merger.workers, merger.size)
        with writing(path):
            file.close()
            lease.check()  # one that was suspended may have lost the accumulator to another process
            partial.replace(path)
            sync_to_disk(path.absolute().parent)
    except BaseException:
        file.abandon()
        partial.unlink(missing_ok=True)
        raise
