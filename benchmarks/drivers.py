"""Merges and prunings that are no command of their own, for merge.py and equal_peers.py to run as processes.

`python benchmarks/drivers.py NAME JSON`: the JSON object holds the function's arguments. fusion_bench runs in that
library's environment, mergekit_dare in mergekit's, the rest in this project's. The last line printed is a JSON object.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WEIGHTS = "model.safetensors"


def fusion_bench(
    method: str, settings: dict[str, Any], base: str, experts: list[str], out: str, masks: str = ""
) -> Any:
    """Merge with fusion-bench's class `method`; `masks` (a safetensors file) takes the place of DARE's random numbers.

    The models are loaded without their head (WhisperModel): its merging would count the tied head twice.
    """
    started = time.perf_counter()
    import fusion_bench.method  # type: ignore[import-not-found]
    import torch
    from fusion_bench.modelpool import BaseModelPool  # type: ignore[import-not-found]
    from safetensors.torch import load_file, save_file
    from transformers import WhisperModel

    imported = time.perf_counter()
    models = {"_pretrained_": WhisperModel.from_pretrained(base)}
    models |= {f"e{number}": WhisperModel.from_pretrained(expert) for number, expert in enumerate(experts)}
    if masks:
        kept = load_file(masks)
        names = [name for name, _ in models["_pretrained_"].named_parameters()]
        queue = iter([kept[f"{number}/model.{name}"] for number in range(len(experts)) for name in names])
        torch.rand_like = lambda tensor: next(queue).to(tensor.dtype)  # type: ignore[assignment]
    loaded = time.perf_counter()
    merged = getattr(fusion_bench.method, method)(**settings).run(BaseModelPool(models))
    done = time.perf_counter()
    Path(out).mkdir()
    save_file({f"model.{n}": t.detach().contiguous() for n, t in merged.state_dict().items()}, Path(out) / WEIGHTS)
    times = {"import": imported - started, "load": loaded - imported, "merge": done - loaded}
    return times | {"save": time.perf_counter() - done}


def mergekit_dare(
    method: str, density: float, weights: list[float], base: str, experts: list[str], out: str, masks: str
) -> Any:
    """Merge with mergekit's own function for dare_linear or dare_ties, its random masks replaced by those of a file."""
    import torch
    from mergekit.merge_methods.api import merge_tensors  # type: ignore[import-not-found]
    from safetensors.torch import load_file, save_file

    models = [load_file(f"{model}/{WEIGHTS}") for model in (base, *experts)]
    kept = load_file(masks)
    merged = {}
    for name in models[0]:
        queue = iter([kept[f"{number}/{name}"] for number in range(len(experts))])
        torch.bernoulli = lambda chances, queue=queue: next(queue).to(chances.dtype)  # type: ignore[assignment]
        settings = {"weight": weights, "density": [density] * len(experts)}
        merged[name] = merge_tensors([model[name] for model in models], method, parameters=settings, base_index=0)
    Path(out).mkdir()
    save_file(merged, Path(out) / WEIGHTS)
    return {}


def svd_prune(base: str, expert: str, out: str, rank_ratio: float, density: float) -> Any:
    """LoRS on one expert as one would write it with torch alone: a full SVD and a top-k of the residual."""
    import torch
    from safetensors.torch import save_file

    parts = {}
    for name, delta in deltas(base, expert):
        if delta.ndim < 2:
            parts[f"{name}/whole"] = delta
            continue
        matrix = delta.reshape(delta.shape[0], -1)
        rank = max(1, round(rank_ratio * min(matrix.shape)))
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        us, vh = (u[:, :rank] * s[:rank]).contiguous(), vh[:rank].contiguous()
        residual = (matrix - us @ vh).reshape(-1)
        indices = residual.abs().topk(max(1, round(density * residual.numel()))).indices.sort().values
        parts |= {f"{name}/us": us, f"{name}/vh": vh}
        parts |= {f"{name}/indices": indices.to(torch.int32), f"{name}/values": residual[indices]}
    save_file(parts, out)
    return {}


def distance(base: str, expert: str, out: str, rank_ratio: float) -> Any:
    """How far the low-rank parts in a delta file are from the optimum, |L - L_r| / |L_r| (Frobenius), at the worst.

    The optimum is a float64 SVD; of the tensors of one shape the first is taken, and no word embedding.
    """
    import torch

    from lors.delta_file import DeltaFile

    file, seen, worst = DeltaFile(out), {(0,)}, 0.0
    for name, delta in deltas(base, expert):
        shape = tuple(delta.shape)
        if delta.ndim < 2 or shape in seen or "embed_tokens" in name or not delta.any():
            continue
        seen.add(shape)
        parts = file.parts(name)
        assert parts.us is not None
        assert parts.vh is not None
        u, s, vh = torch.linalg.svd(delta.reshape(shape[0], -1).double(), full_matrices=False)
        rank = parts.us.shape[1]
        assert rank == max(1, round(rank_ratio * len(s))), f"{name} has rank {rank}"
        best = (u[:, :rank] * s[:rank]) @ vh[:rank]
        worst = max(worst, float((parts.us.double() @ parts.vh.double() - best).norm() / best.norm()))
    return {"distance": worst, "tensors": len(seen) - 1}


def deltas(base: str, expert: str) -> Iterator[tuple[str, Any]]:
    """(name, expert minus base, float32) of two single-file models, one tensor at a time."""
    from safetensors import safe_open

    with safe_open(f"{base}/{WEIGHTS}", "pt") as ours, safe_open(f"{expert}/{WEIGHTS}", "pt") as theirs:
        for name in ours.keys():  # noqa: SIM118 (not a mapping)
            yield name, theirs.get_tensor(name).float() - ours.get_tensor(name).float()


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](**json.loads(sys.argv[2]))))
