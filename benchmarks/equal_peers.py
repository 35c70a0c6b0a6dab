"""Our numbers beside mergekit's and fusion-bench's, method by method: see benchmarks/README.md.

    python benchmarks/equal_peers.py --work bench --peers peers

Three experts of a small Whisper are merged by the peer and by `lors.merging` with `like` the peer. For each method: the
largest absolute difference, and at how many entries one of the two leaves the base as it is and the other does not
(none may, where the method prunes).
The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lors.errors import LorsError
from lors.merging import make_recipe
from lors.merging.folders import merge_folders

HERE = Path(__file__).resolve().parent
EXPERTS = ("e0", "e1", "e2")
WEIGHTS = {"e0": 0.5, "e1": 0.3, "e2": 0.9}
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One method at one setting, theirs and ours; ours is completed by the preset named `like`."""

    name: str
    peer: str  # mergekit or fusion-bench
    theirs: dict[str, Any]  # mergekit: configuration without models; fusion-bench: the class's arguments
    method: str
    ours: dict[str, Any] = field(default_factory=dict)  # parameters
    scaling: float | None = None
    each: dict[str, Any] = field(default_factory=dict)  # mergekit: of every model, beside its weight
    weights: bool = True  # whether the merge weights differ
    experts: Sequence[str] = EXPERTS
    density: float | None = None  # of the random masks
    relative: str = ""  # mergekit: the expert that takes the base's place
    decomposes: bool = False


MERGEKIT = [
    Case("task_arithmetic", "mergekit", {"parameters": {"lambda": 0.7}}, "task_arithmetic", scaling=0.7),
    Case("linear", "mergekit", {}, "linear"),
    Case("slerp", "mergekit", {"parameters": {"t": 0.3}}, "slerp", {"t": 0.3}, experts=EXPERTS[:2], relative="e0"),
    Case("ties", "mergekit", {"parameters": {"lambda": 0.7}}, "ties", {"density": 0.3}, 0.7, {"density": 0.3}),
    Case(
        "ties",
        "mergekit",
        {"parameters": {"rescale": True}},
        "ties",
        {"density": 0.3, "rescale": "l1"},
        None,
        {"density": 0.3},
    ),
    Case(
        "ties",
        "mergekit",
        {"parameters": {"normalize": False}},
        "ties",
        {"density": 0.01, "divisor": "none"},
        None,
        {"density": 0.01},
    ),
    Case("dare_linear", "mergekit", {}, "dare_linear", {"density": 0.4}, density=0.4),
    Case("dare_ties", "mergekit", {}, "dare_ties", {"density": 0.4}, density=0.4),
    Case(
        "breadcrumbs",
        "mergekit",
        {},
        "breadcrumbs",
        # Among the many small magnitudes (density 0.5 and more) a cut meets equal ones, which mergekit sorts at will.
        {"density": 0.2, "gamma": 0.02},
        None,
        {"density": 0.2, "gamma": 0.02},
    ),
    Case("model_stock", "mergekit", {}, "model_stock", weights=False),
]
FUSION = "fusion-bench"
TIES = {"scaling_factor": 0.3, "threshold": 20, "remove_keys": []}
FUSION_BENCH = [
    Case("TaskArithmeticAlgorithm", FUSION, {"scaling_factor": 0.3}, "task_arithmetic", scaling=0.3),
    Case("TiesMergingAlgorithm", FUSION, TIES | {"merge_func": "sum"}, "ties", {"density": 0.2}, 0.3),
    Case(
        "TiesMergingAlgorithm", FUSION, TIES | {"merge_func": "mean"}, "ties", {"density": 0.2, "divisor": "count"}, 0.3
    ),
    Case(
        "DareTaskArithmetic",
        FUSION,
        {"scaling_factor": 0.3, "sparsity_ratio": 0.6, "only_on_linear_weights": False},
        "dare_linear",
        {"density": 0.4},
        0.3,
        density=0.4,
    ),
    Case("MagMaxAlgorithm", FUSION, {"scaling_factor": 0.5}, "magmax", scaling=0.5),
    Case("TaskSingularVectorMerging", FUSION, {"alpha": 0.8}, "tsv_m", scaling=0.8, decomposes=True),
    Case("ISO_C_Merge", FUSION, {"scaling_factor": 0.8}, "iso_c", scaling=0.8, decomposes=True),
    Case(
        "ISO_CTS_Merge",
        FUSION,
        {"scaling_factor": 0.8, "common_space_fraction": 0.8},
        "iso_cts",
        scaling=0.8,
        decomposes=True,
    ),
]


def merge_ours(
    case: Case, models: Path, out: Path, parameters: dict[str, Any] | None = None, only: str = ""
) -> Tensors:
    """Our merge of a case (or, for a mask, of the expert `only`)."""
    like = case.peer.replace("-", "")
    recipe = make_recipe(case.method, case.ours | (parameters or {}), scaling=1.0 if only else case.scaling, like=like)
    experts = {expert: models / expert for expert in ([only] if only else case.experts)}
    weights = {expert: WEIGHTS[expert] for expert in experts} if weighted(case) and not only else None
    merge_folders(models / "base", experts, out, recipe, weights=weights)
    return read(out)


def weighted(case: Case) -> bool:
    """Whether the merge weights differ: fusion-bench has none."""
    return case.peer == "mergekit" and case.weights and case.method != "slerp"


def masks_of(case: Case, models: Path, work: Path) -> Path:
    """Our random masks as a file: where the merge of one expert alone differs from the base."""
    base = read(models / "base")
    masks: Tensors = {}
    for number, expert in enumerate(case.experts):
        alone = merge_ours(case, models, clean(work / "alone"), only=expert)
        masks |= {f"{number}/{name}": (alone[name] != base[name]).to(torch.uint8) for name in base}
    save_file(masks, work / "masks.safetensors")
    return work / "masks.safetensors"


def merge_theirs(case: Case, models: Path, binaries: Path, work: Path) -> Tensors:
    """The peer's merge of a case. Raises CalledProcessError."""
    out = clean(work / "theirs")
    paths = [str(models / expert) for expert in case.experts]
    shared: dict[str, Any] = {"base": str(models / "base"), "experts": paths, "out": str(out)}
    masks = {"masks": str(masks_of(case, models, work))} if case.density else {}
    if case.peer == FUSION:
        arguments = shared | masks | {"method": case.name, "settings": case.theirs}
        command = driver(binaries, "fusion_bench", arguments)
    elif case.density:
        weights = [WEIGHTS[expert] for expert in case.experts]
        arguments = shared | masks | {"method": case.name, "density": case.density, "weights": weights}
        command = driver(binaries, "mergekit_dare", arguments)
    else:
        command = mergekit(case, models, binaries, work, out)
    subprocess.run(command, check=True, capture_output=True, text=True)
    return read(out)


def mergekit(case: Case, models: Path, binaries: Path, work: Path, out: Path) -> list[str]:
    """`mergekit-pytorch` for a case, its configuration written (JSON is YAML)."""
    each = [
        {
            "model": str(models / expert / "model.safetensors"),
            "parameters": {"weight": WEIGHTS[expert], **case.each} if weighted(case) else dict(case.each),
        }
        for expert in case.experts
    ]
    base = (
        {} if case.method == "linear" else {"base_model": str(models / (case.relative or "base") / "model.safetensors")}
    )
    config = work / "mergekit.yaml"
    config.write_text(json.dumps({"merge_method": case.name, "models": each, **base, **case.theirs}), encoding="utf-8")
    return [str(binaries / "mergekit-pytorch"), str(config), str(out)]


def driver(binaries: Path, name: str, arguments: dict[str, Any]) -> list[str]:
    """A function of drivers.py as a command."""
    return [str(binaries / "python"), str(HERE / "drivers.py"), name, json.dumps(arguments)]


def clean(folder: Path) -> Path:
    """A place for a folder, emptied."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def read(folder: Path) -> Tensors:
    """All tensors of a model folder."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def compare(ours: Tensors, theirs: Tensors, base: Tensors) -> tuple[float, int, float]:
    """(largest absolute difference, entries whose zero pattern differs, largest delta)."""
    assert ours.keys() == theirs.keys() == base.keys(), "not the same tensors"
    worst = max(float((ours[name] - theirs[name]).abs().max()) for name in base)
    zeros = sum(int(((ours[name] == base[name]) != (theirs[name] == base[name])).sum()) for name in base)
    return worst, zeros, max(float((theirs[name] - base[name]).abs().max()) for name in base)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for models (kept, used again) and outputs")
    parser.add_argument(
        "--peers", type=Path, required=True, help="folder of the environments mergekit and fusion-bench"
    )
    parser.add_argument("--only", default="", help="only the rows whose name holds this")
    options = parser.parse_args()
    work = options.work.resolve()
    build = [sys.executable, str(HERE / "models.py"), str(work), "mini", str(len(EXPERTS))]
    subprocess.run(build, check=True, capture_output=True)
    models = work / "mini"
    base = read(models / "base")
    differences: dict[str, float] = {}
    counts = dict.fromkeys(("equal", "different", "failed"), 0)
    for case in (*MERGEKIT, *FUSION_BENCH):
        name = f"{case.peer} {case.method} {' '.join(f'{key}={value}' for key, value in case.ours.items())}".strip()
        binaries = options.peers.absolute() / case.peer / "bin"
        if options.only not in name:
            continue
        if not (binaries / "python").exists():
            print(f"{name:<60}left out: {case.peer} is not under --peers; see benchmarks/README.md", flush=True)
            continue
        try:
            theirs = merge_theirs(case, models, binaries, work)
            ours = merge_ours(case, models, clean(work / "ours"))
        except (LorsError, subprocess.CalledProcessError) as error:
            said = error.stderr.strip().splitlines()[-1] if isinstance(error, subprocess.CalledProcessError) else error
            print(f"{name:<60}FAILED: {said}", flush=True)
            counts["failed"] += 1
            continue
        worst, zeros, largest = compare(ours, theirs, base)
        limit = 1e-5 if case.decomposes else 1e-6
        # A dense method may round to the base in one order of the sum and not in another.
        verdict = "equal" if worst <= limit and not (zeros and "density" in case.ours) else "different"
        counts[verdict] += 1
        differences[name] = worst
        said = f"difference {worst:.1e} (limit {limit:.0e}, largest delta {largest:.1e}), {zeros} zeros differ"
        print(f"{name:<60}{verdict}: {said}", flush=True)
    print(json.dumps(differences | counts))
    return 1 if counts["different"] or counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
