"""The commands on checkpoints: `lors merge | prune | apply | diagnose | export-lora`. No Prefect here."""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import glob
import json
import shutil
import signal
import sys
import threading
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flows.checkpoint_options import (
    EXPERT,
    add_base,
    add_experts,
    add_force,
    add_merge,
    add_out,
    add_pruning,
    add_workers,
    chooses_recipe,
    experts_of,
    given_pruning,
    pruning_of,
    recipe_of,
    removed_of,
    weights_of,
)
from flows.method_list import list_methods
from lors.errors import InputError
from lors.model_folder import DigestsAhead

__all__ = ["add_commands"]


def add_commands(add: Callable[..., Any]) -> None:
    """Add each command to the parser of `flows.cli`."""
    add = functools.partial(_added, add)
    merge = add(
        "merge",
        _merge,
        "Merge fine-tuned checkpoints (or compact experts) into their base.",
        "lors merge --base openai/whisper-small --expert es=runs/es --expert fr=runs/fr --out merged --scaling 0.5",
        "lors merge --base starter --expert es=es.safetensors --out merged --method ties --set density=0.1",
        "lors merge --base starter --expert es=runs/es --out merged --group encoder:scaling=0.3,rank_ratio=0.2",
        "lors merge --base starter --expert es=runs/es --out merged --method tsv_m --prune lors:rank_ratio=0.05",
        "lors merge --into all.safetensors --base starter --expert es=runs/es --method ties",
        "lors merge --into all.safetensors --expert it=runs/it --remove es --out merged",
    )
    add_merge(merge)
    prune = add(
        "prune",
        _prune,
        "Prune an expert's task vector to a low-rank plus a sparse part: one compact file.",
        "lors prune --base openai/whisper-small --expert runs/es --out es.safetensors --budget 20MB",
        "lors prune --base openai/whisper-small --expert runs/es --out es.safetensors --rank-ratio 0.05 --density 0.02",
    )
    add_base(prune)
    prune.add_argument("--expert", required=True, metavar="MODEL", help=EXPERT)
    prune.add_argument("--out", type=Path, required=True, metavar="FILE", help="the compact expert, FILE.safetensors")
    prune.add_argument("--budget", metavar="SIZE", help="as large as this, such as 20MB: ranks and densities by energy")
    prune.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16", "int8"),
        help="of what is stored (default: float32; with --budget what keeps most energy in it)",
    )
    add_pruning(prune)
    add_workers(prune)
    apply = add(
        "apply",
        _apply,
        "Apply a compact expert to its base: a complete model folder.",
        "lors apply --base openai/whisper-small --expert es.safetensors --out es",
    )
    add_base(apply)
    apply.add_argument("--expert", required=True, metavar="FILE", help="a compact expert (.safetensors)")
    add_out(apply, "the model")
    apply.add_argument("--scaling", type=float, default=1.0, metavar="LAMBDA", help="times its delta (default: 1)")
    add_force(apply)
    add_workers(apply)
    export = add(
        "export-lora",
        _export_lora,
        "Write the low-rank part of a compact expert as a PEFT LoRA adapter.",
        "lors export-lora --base openai/whisper-small --expert es.safetensors --out es-lora",
    )
    add_base(export)
    export.add_argument("--expert", required=True, metavar="FILE", help="a compact expert (.safetensors)")
    add_out(export, "the adapter")
    export.add_argument("--scaling", type=float, default=1.0, metavar="LAMBDA", help="times its delta (default: 1)")
    diagnose = add(
        "diagnose",
        _diagnose,
        "Show how experts differ from their base and from one another, before merging: energy, ranks, interference.",
        "lors diagnose --base openai/whisper-small --expert es=runs/es --expert fr=runs/fr --out diagnosis",
    )
    add_base(diagnose)
    add_experts(diagnose)
    diagnose.add_argument(
        "--out", type=Path, metavar="FOLDER", help="diagnosis.json and diagnosis.html; must not exist or be empty"
    )
    add_force(diagnose)


def _added(add: Callable[..., Any], name: str, command: Callable[[argparse.Namespace], int], *texts: str) -> Any:
    def stoppable(options: argparse.Namespace) -> int:
        before: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():
            # What stops a container, or a job, cleans up as Ctrl-C does.
            found = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)}
            before = {one: handler for one, handler in found.items() if handler not in (signal.SIG_IGN, None)}

        def stop(number: int, frame: object) -> None:
            for one in before:
                signal.signal(one, signal.SIG_IGN)  # a second one would stop the cleaning up
            raise KeyboardInterrupt

        try:
            for one in before:
                signal.signal(one, stop)
            return command(options)
        except KeyboardInterrupt:
            print("lors: stopped; nothing half-written is left", file=sys.stderr)
            return 130
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)
            gc.freeze()  # or Python walks all of torch as it ends, for a third of a second

    return add(name, stoppable, *texts)


def _start() -> None:
    """Import the engine half a second faster, and let memory that is freed be used again."""
    sys.setswitchinterval(0.0005)  # threads that hash and merge wait for Python's lock a tenth as long
    gc.disable()  # nothing that an import makes is garbage
    try:
        import lors.merging.folders  # noqa: F401
    finally:
        gc.freeze()
        gc.enable()
    # glibc gives each freed block of a MB back to the kernel, which zeroes it anew when the next one is taken.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(_MMAP_THRESHOLD, 2**28)
        mallopt(_TRIM_THRESHOLD, 2**28)


_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # malloc.h


def _merge(options: argparse.Namespace) -> int:
    if options.list:
        return list_methods(options.json)
    if options.into is not None:
        return _merge_into(options)
    for name in ("base", "out"):
        if getattr(options, name) is None:
            raise InputError(f"--{name} is missing; see `lors merge --help`")
    if options.remove:
        raise InputError("--remove takes an expert out of an accumulator; name it with --into")

    experts = experts_of(options.expert)
    memo = DigestsAhead([_model(options.base), *experts.values()])
    recipe = recipe_of(options)
    _start()

    from lors.merging.folders import merge_folders
    from lors.prune_settings import PruneSettings

    with _bar("merging") as advance:
        result = merge_folders(
            _model(options.base),
            experts,
            options.out,
            recipe,
            weights=weights_of(options.weight),
            memo=memo,
            refuse_other_pruning=bool(given_pruning(options)) or recipe.pruning not in (None, PruneSettings()),
            force=options.force,
            workers=options.workers,
            on_progress=advance,
        )
    facts = {
        "out": str(result.out),
        "method": recipe.method,
        "scaling": recipe.scaling,
        "recipe": recipe.model_dump(mode="json"),
        "weights": result.weights,
        "parameters": result.parameters,
        "retained_energy": result.retained_energy,
        "digest": result.digest,
        "seconds": round(result.seconds, 2),
    }
    kept = "".join(f", {name} keeps {energy:.1%} of its energy" for name, energy in result.retained_energy.items())
    sentence = (
        f"merged {_count(experts, 'expert')} by {recipe.method} with scaling {recipe.scaling:g} into {result.out} "
        f"({_short(result.parameters)} parameters, {result.seconds:.1f} s{kept})"
    )
    return _say(options, facts, sentence)


def _merge_into(options: argparse.Namespace) -> int:
    _start()
    from lors.checkpoint import Checkpoint
    from lors.errors import CheckpointError
    from lors.files import new_folder
    from lors.merging.accumulator import Accumulator, accumulate, write_accumulated

    add, remove, into = experts_of(options.expert), removed_of(options.remove), options.into
    if into.suffix != ".safetensors" or into.is_dir():
        raise InputError(f"{into} is no name for an accumulator; give a file that ends in .safetensors")
    if not add and not remove and options.out is None:
        raise InputError("there is nothing to do: give --expert, --remove or --out")
    if options.weight and not add:
        raise InputError("--weight is of an expert that is added; give that one with --expert")
    if options.out is not None:
        new_folder(options.out)
    old = Accumulator(into) if into.exists() else None
    if old is None and (options.base is None or not add):
        raise InputError(f"{into} is not there yet: give --base and at least one --expert to begin it")
    if old is not None and chooses_recipe(options):
        raise InputError(
            f"{into} was begun with {old.recipe.method}, and its recipe cannot change; "
            f"leave the method and its settings out (--scaling may change), or begin a new accumulator"
        )
    if old is not None and options.scaling is not None and options.out is None:
        raise InputError("--scaling is of the merged model; give --out as well, or leave it out")
    recipe = old.recipe if old else recipe_of(options)
    try:
        base = Checkpoint(_model(options.base or (old.base if old else "")))
    except CheckpointError as error:
        if options.base is None:
            raise CheckpointError(f"the base of {into} is not where it was ({error}); name it with --base") from error
        raise
    state = old
    if add or remove:
        with _bar("adding" if add else "removing") as advance:
            weights = weights_of(options.weight)
            state = accumulate(
                into, base, recipe, add=add, remove=remove, weights=weights,
                force=options.force, workers=options.workers, on_progress=advance,
            )  # fmt: skip
    assert state is not None
    scaling = recipe.scaling if options.scaling is None else options.scaling
    if options.out is not None:
        try:
            with _bar("merging") as advance:
                write_accumulated(
                    state, base, options.out, scaling=scaling, workers=options.workers, on_progress=advance
                )
        except (InputError, CheckpointError) as error:
            if not add and not remove:
                raise
            raise type(error)(f"{error}; {into} is changed already: next time give --out without --expert") from error
    facts = {
        "into": str(into),
        "out": None if options.out is None else str(options.out),
        "method": recipe.method,
        "scaling": scaling,
        "recipe": recipe.model_dump(mode="json"),
        "experts": state.experts,
    }
    names = f" ({', '.join(sorted(state.experts))})" if state.experts else ""
    sentence = f"{into} holds {_count(state.experts, 'expert')}{names} merged by {recipe.method}"
    if options.out is not None:
        sentence += f"; the merged model, with scaling {scaling:g}, is in {options.out}"
    return _say(options, facts, sentence)


def _prune(options: argparse.Namespace) -> int:
    _start()
    from lors.compact import prune_expert

    ratios = [name for name in ("rank_ratio", "density") if getattr(options, name) is not None]
    if options.budget and ratios not in ([], ["density"] if options.composition == "sequential" else []):
        raise InputError(f"--budget chooses ranks and densities; leave it or --{ratios[0].replace('_', '-')} out")
    with _bar("pruning") as advance:
        file = prune_expert(
            _model(options.base),
            options.expert,
            options.out,
            pruning_of(options),
            dtype=options.dtype,
            budget=options.budget,
            workers=options.workers,
            on_progress=advance,
        )
    size = file.path.stat().st_size
    facts = {
        "out": str(file.path),
        "bytes": size,
        "retained_energy": file.retained_energy,
        "dtype": file.dtype,
        "settings": file.settings.model_dump(mode="json") if file.settings else None,
        "digest": file.digest(),
    }
    return _say(options, facts, f"{file.path}: {_short(size)}B, {file.retained_energy:.1%} of the task vector's energy")


def _apply(options: argparse.Namespace) -> int:
    _start()
    from lors.merging import make_recipe
    from lors.merging.folders import merge_folders

    _need_file(options.expert, "apply")
    with _bar("applying") as advance:
        result = merge_folders(
            _model(options.base),
            {Path(options.expert).stem: options.expert},
            options.out,
            make_recipe("task_arithmetic", scaling=options.scaling),
            force=options.force,
            workers=options.workers,
            on_progress=advance,
        )
    facts = {"out": str(result.out), "parameters": result.parameters, "digest": result.digest}
    return _say(options, facts, f"applied {options.expert} with scaling {options.scaling:g}: {result.out}")


def _export_lora(options: argparse.Namespace) -> int:
    _start()
    from lors.checkpoint import Checkpoint
    from lors.delta_file import DeltaFile
    from lors.lora import export_lora

    _need_file(options.expert, "export-lora")
    base, file = Checkpoint(_model(options.base)), DeltaFile(options.expert)
    exported = export_lora(base, file, options.out, scaling=options.scaling)
    facts = {"out": str(options.out), "modules": exported.modules, "left_out": exported.left_out}
    left = f", without the deltas of {len(exported.left_out)} parameters (see its README)" if exported.left_out else ""
    return _say(options, facts, f"{options.out}: a LoRA adapter of {len(exported.modules)} modules{left}")


def _diagnose(options: argparse.Namespace) -> int:
    _start()
    from lors.checkpoint import Checkpoint
    from lors.diagnostics import diagnose
    from lors.diagnostics_page import page
    from lors.files import write_json, writing
    from lors.merging.folders import open_experts

    experts = experts_of(options.expert)
    if not experts:
        raise InputError("no expert was given; give at least one --expert")
    base = Checkpoint(_model(options.base))
    with _folder_of(options.out) as folder:
        vectors, _, _ = open_experts(base, experts, force=options.force)
        with _bar("diagnosing") as advance:
            diagnosis = diagnose(base, vectors, on_progress=advance)
        if folder is not None:
            html = page(diagnosis, f"{', '.join(vectors)} on {base.label}")
            with writing(options.out):
                write_json(folder / "diagnosis.json", diagnosis.to_json())
                (folder / "diagnosis.html").write_text(html, encoding="utf-8")
    sentence = diagnosis.table()
    if options.out is not None:
        sentence += f"\n\nThe page is {options.out / 'diagnosis.html'}, the figures are in diagnosis.json beside it."
    return _say(options, diagnosis.to_json(), sentence)


@contextmanager
def _folder_of(out: Path | None) -> Iterator[Path | None]:
    """A folder that becomes `out` when the block ends without an error; nothing where there is no `out`."""
    from lors.files import new_folder, writing

    if out is None:
        yield None
        return
    with writing(out):
        place = new_folder(out)
        partial = place.with_name(f".{place.name}.{uuid.uuid4().hex[:8]}.partial")
        partial.mkdir(parents=True)
    try:
        yield partial
        with writing(out):
            partial.rename(place)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _count(things: Collection[object], word: str) -> str:
    return f"{len(things)} {word}{'' if len(things) == 1 else 's'}"


def _short(number: int) -> str:
    """7.3 k, 72.6 M."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number} "


def _model(name: str) -> str | Path:
    from lors.starter import MODEL_FOLDER

    return MODEL_FOLDER if name == "starter" else name


def _need_file(source: str, command: str) -> None:
    if Path(source).suffix != ".safetensors":
        raise InputError(f"{command} takes a compact expert (.safetensors), not {source}; make it with `lors prune`")


def _say(options: argparse.Namespace, facts: Mapping[str, Any], sentence: str) -> int:
    places = [path.absolute() for path in (options.out, getattr(options, "into", None)) if path is not None]
    patterns = [
        (path.parent, pattern) for path in places for pattern in (f".{glob.escape(path.name)}.*.partial", ".lors-*")
    ]
    for left in sorted({left for folder, pattern in patterns for left in folder.glob(pattern)}):
        print(f"lors: {left} is what a killed run left; remove it unless that run still goes on", file=sys.stderr)
    print(json.dumps(facts, indent=2, default=str) if options.json else sentence)
    return 0


@contextmanager
def _bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """Gives `advance(done, total)`: a bar in a terminal, a line every quarter in a log."""
    from rich.console import Console
    from rich.progress import Progress

    shown = 0

    def line(done: int, total: int) -> None:
        nonlocal shown
        if total and done * 4 // total > shown:
            shown = done * 4 // total
            print(f"{title}: {done / total:.0%}", file=sys.stderr)

    if not sys.stderr.isatty():
        yield line
        return
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
