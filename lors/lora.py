"""A compact expert's low-rank part as a LoRA adapter that `peft` loads (Hu et al. 2021, arXiv 2106.09685, sec. 4.1)."""

from __future__ import annotations

import json
import shutil
import uuid
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lors.checkpoint import Checkpoint
from lors.delta_file import DeltaFile
from lors.errors import CheckpointError, InputError
from lors.files import new_folder, sync_to_disk, writing

__all__ = ["LoraExport", "export_lora"]

EMBEDDING, HEAD = "model.decoder.embed_tokens", "proj_out"


@dataclass(frozen=True, slots=True)
class LoraExport:
    """What was written, and what LoRA has no place for."""

    out: Path
    modules: dict[str, int]  # the rank by module
    left_out: tuple[str, ...]  # parameters whose delta, or a part of it, is not in the adapter
    bytes: int


def export_lora(
    base: Checkpoint,
    file: DeltaFile,
    out: str | Path,
    scaling: float = 1.0,  # the scaling coefficient, multiplied into the factors
) -> LoraExport:
    """Write the low-rank part of a compact expert as a PEFT adapter folder: base + scaling * L, float32.

    Linear layers and token embeddings are exported, each with its own rank; a head that is tied to the embeddings gets
    their factors too, which is right as PEFT loads them and twice their delta after its `merge_and_unload`. The sparse
    part and vectors have no place in a LoRA, and Whisper reads attributes of its position embeddings and convolutions
    that PEFT's wrappers do not have, so these are left out.
    The folder appears in one rename.
    Raises CheckpointError: another base, a file without a low-rank part; InputError: `out` cannot be written.
    """
    out = Path(out)
    if not isfinite(scaling):
        raise InputError(f"the scaling coefficient is {scaling}; give a finite number")
    if file.base_digest != base.digest():
        raise CheckpointError(
            f"{file.path} was extracted from another base (digest {file.base_digest[:12]}) than {base.label}; "
            f"give the base that it was pruned against"
        )
    tensors: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    left_out: list[str] = []
    for name in file.names:
        found, complete = _factors(file, name)
        if not complete:
            left_out.append(name)
        if found is not None:
            for module, a, b in _adapters(base, name, found[0] * scaling, found[1]):
                ranks[module] = len(found[1])
                tensors |= {f"base_model.model.{module}.{key}": value for key, value in (a, b)}
    if not ranks:
        raise CheckpointError(
            f"{file.path} has no low-rank part that a LoRA can hold; "
            f"prune with the composition additive or low_rank, or apply the file instead"
        )
    with writing(out):
        place = new_folder(out)
        partial = place.with_name(f".{place.name}.{uuid.uuid4().hex[:8]}.partial")
        partial.mkdir(parents=True)
    try:
        with writing(out):
            save_file(tensors, partial / "adapter_model.safetensors", metadata={"format": "pt"})
            config = json.dumps(_config(base, ranks), indent=2, sort_keys=True) + "\n"
            (partial / "adapter_config.json").write_text(config, encoding="utf-8")
            card = _card(base, file, scaling, left_out, both={EMBEDDING, HEAD} <= ranks.keys() and _tied(base))
            (partial / "README.md").write_text(card, encoding="utf-8")
            (partial / "adapter_model.safetensors").chmod((partial / "README.md").stat().st_mode)
            for path in (*partial.iterdir(), partial):
                sync_to_disk(path)
            partial.rename(place)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return LoraExport(out, ranks, tuple(left_out), sum(path.stat().st_size for path in out.iterdir()))


def _factors(file: DeltaFile, name: str) -> tuple[tuple[torch.Tensor, torch.Tensor] | None, bool]:
    """The factors of a tensor that a LoRA can hold, or None, and whether they are all of its delta."""
    pruned = file.parts(name)
    factors = pruned.factors() if pruned.threshold is None else None
    if factors is None or len(pruned.shape) > 2 or "embed_positions." in name or not name.endswith(".weight"):
        return None, not any(part.count_nonzero() for part in pruned.parts().values())
    return factors, pruned.indices is None


def _adapters(
    base: Checkpoint,
    name: str,
    us: torch.Tensor,  # (m, r)
    vh: torch.Tensor,  # (r, n)
) -> list[tuple[str, tuple[str, torch.Tensor], tuple[str, torch.Tensor]]]:
    """For each module that holds the parameter: its name, and PEFT's A and B by their keys."""
    module, a, b = name.removesuffix(".weight"), ("lora_A.weight", vh), ("lora_B.weight", us)
    if module != EMBEDDING:
        return [(module, a, b)]
    # PEFT multiplies an embedding's factors the other way round: (A^T B^T)[token].
    embedding = module, ("lora_embedding_A", us.T.contiguous()), ("lora_embedding_B", vh.T.contiguous())
    head = HEAD, ("lora_A.weight", vh.clone()), ("lora_B.weight", us.clone())
    return [embedding, head] if _tied(base) else [embedding]


def _tied(base: Checkpoint) -> bool:
    return f"{HEAD}.weight" not in base.names


def _config(base: Checkpoint, ranks: dict[str, int]) -> dict[str, Any]:
    most = max(ranks.values())
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base.hub_id or base.label,
        "inference_mode": True,
        "bias": "none",
        "lora_dropout": 0.0,
        "r": most,
        "lora_alpha": most,
        # PEFT scales by alpha / r, so the two are the same everywhere.
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "target_modules": sorted(ranks),
    }


_TWICE = (
    " Use it as it loads: the head is the token embeddings here, so PEFT's `merge_and_unload` would add their delta "
    "twice; `lors apply` writes a merged model."
)


def _card(base: Checkpoint, file: DeltaFile, scaling: float, left_out: list[str], both: bool) -> str:
    head = ["library_name: peft", "tags: [lors, lora]"] + ([f"base_model: {base.hub_id}"] if base.hub_id else [])
    listed = "\n".join(f"- `{name}`" for name in left_out) or "Nothing."
    return (
        "\n\n".join(
            [
                "\n".join(["---", *head, "---"]),
                f"# The low-rank part of {file.path.stem}",
                f"A LoRA adapter for {base.label}, with the scaling coefficient {scaling} multiplied in: "
                f"`PeftModel.from_pretrained(base, this_folder)`." + (_TWICE if both else ""),
                "## Left out",
                "The deltas of these parameters, or the sparse part of them, are not in this adapter; "
                "`lors apply` applies them all.",
                listed,
            ]
        )
        + "\n"
    )
