"""Task vectors: extracted, pruned, combined, scaled, and written as a model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lors.stages.common import VECTOR, Report, load, use
from lors.stages.validating import mean_losses, validation_error
from lors.store import write_json

__all__ = [
    "combine_task_vectors",
    "extract_task_vector",
    "prune_task_vector",
    "score_scaling",
    "select_scaling",
    "write_model",
]


def extract_task_vector(
    inputs: Mapping[str, str], places: Mapping[str, Any], digests: Mapping[str, str], out: str, **_: Any
) -> dict[str, Any]:
    """Expert minus base, dense, as a delta file."""
    from lors.checkpoint import Checkpoint
    from lors.delta_file import write_dense
    from lors.task_vector import extract

    base, expert = Checkpoint(places["base"]), Checkpoint(inputs["expert"])
    written = write_dense(Path(out) / VECTOR, extract(base, expert), base_digest=base.digest())
    return {"tensors": len(written.names)}


def prune_task_vector(
    settings: Mapping[str, Any], inputs: Mapping[str, str], out: str, threads: int, **_: Any
) -> dict[str, Any]:
    """LoRS on a task vector: the compact expert."""
    from lors.delta_file import DeltaFile, write
    from lors.prune import PruneSettings, prune_task_vector

    use(threads)
    vector, own = DeltaFile(Path(inputs["task_vector"]) / VECTOR), PruneSettings(**settings)
    pruned = write(
        Path(out) / VECTOR, prune_task_vector(vector.items(), own), base_digest=vector.base_digest, settings=own
    )
    return {"retained_energy": round(pruned.retained_energy, 6), "bytes": pruned.path.stat().st_size}


def combine_task_vectors(
    settings: Mapping[str, Any], inputs: Mapping[str, str], places: Mapping[str, Any], out: str, threads: int, **_: Any
) -> dict[str, Any]:
    """The experts' task vectors as one, before the scaling coefficient."""
    from lors.checkpoint import Checkpoint
    from lors.delta_file import DeltaFile, write_dense
    from lors.merging.engine import Merger
    from lors.merging.recipe import Recipe

    base = Checkpoint(places["base"])
    vectors = {expert: DeltaFile(Path(folder) / VECTOR) for expert, folder in inputs.items()}
    recipe = Recipe.model_validate(settings["recipe"])
    with Merger(base, vectors, recipe, settings["weights"], workers=threads, scratch=Path(out)) as merger:
        write_dense(Path(out) / VECTOR, merger.deltas(), base_digest=base.digest())
    return {"experts": len(vectors)}


def score_scaling(
    settings: Mapping[str, Any],
    inputs: Mapping[str, str],
    places: Mapping[str, Any],
    out: str,
    threads: int,
    report: Report,
    **_: Any,
) -> dict[str, Any]:
    """One point of the search: the error of base + scaling * combined on the validation splits."""
    from lors.speech.corpus import read_split

    model, processor = _load_merged(places["base"], inputs["combined"], settings, threads)
    measure = mean_losses if settings["metric"] == "loss" else validation_error
    errors: dict[str, float] = {}
    for number, language in enumerate(settings["languages"]):
        utterances = read_split(Path(inputs[f"corpus-{language}"]) / "validation.parquet")
        errors |= measure(model, processor, utterances, language, settings)
        report({"done": number + 1, "total": len(settings["languages"]), "unit": "languages"})
    row = {"scaling": settings["scaling"], "error": sum(errors.values()) / len(errors), "errors": errors}
    write_json(Path(out) / "point.json", row)
    return {"error": row["error"]}


def select_scaling(settings: Mapping[str, Any], inputs: Mapping[str, str], out: str, **_: Any) -> dict[str, Any]:
    """The scaling coefficient with the least validation error (the smaller of equals), or the one that was set."""
    points = [json.loads((Path(folder) / "point.json").read_text()) for folder in inputs.values()]
    chosen = settings["scaling"] if not points else min(points, key=lambda p: (p["error"], p["scaling"]))["scaling"]
    curve = sorted(points, key=lambda p: float(p["scaling"]))
    write_json(Path(out) / "scaling.json", {"scaling": chosen, "points": curve})
    return {"scaling": chosen}


def write_model(
    settings: Mapping[str, Any],
    inputs: Mapping[str, str],
    places: Mapping[str, Any],
    digests: Mapping[str, str],
    out: str,
    **_: Any,
) -> dict[str, Any]:
    """The merged model: a complete Hugging Face folder in the base's dtypes."""
    from lors.checkpoint import Checkpoint
    from lors.merging import get_method
    from lors.model_writer import write_model_folder

    scaling = json.loads((Path(inputs["scaling"]) / "scaling.json").read_text())["scaling"]
    method = get_method(settings["method"])
    base = Checkpoint(places["base"])
    written = write_model_folder(
        Path(out),
        base,
        _merged(places["base"], inputs["combined"], {**settings, "scaling": scaling}),
        title=f"Merged by {method.name}",
        text=f"`{method.formula}` with scaling coefficient {scaling:g} ({method.reference}).",
        provenance={"method": method.name, "scaling": scaling, "digests": dict(digests)},
    )
    return {"scaling": scaling, "parameters": written.parameters}


def _load_merged(base: str, combined: str, settings: Mapping[str, Any], threads: int) -> tuple[Any, Any]:
    """What `load` gives of the folder that `write_model` makes, without writing it."""
    model, processor = load(base, threads)
    merged = {name: tensor.float() for name, tensor in _merged(base, combined, settings)}
    odd = model.load_state_dict(merged, strict=False).unexpected_keys
    assert not odd, f"the search would score a model without its merged {odd[0]}"
    return model, processor


def _merged(base: str, combined: str, settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(name, base + scaling * delta in the base's dtype) for every float tensor: the search and the result share it."""
    from lors.checkpoint import Checkpoint
    from lors.delta_file import DeltaFile
    from lors.merging.recipe import Recipe
    from lors.task_vector import apply

    checkpoint, vector = Checkpoint(base), DeltaFile(Path(combined) / VECTOR)
    recipe = Recipe(scaling=settings["scaling"], groups=settings["groups"])
    for name in checkpoint.float_names:
        scaling = recipe.scaling_of(name, checkpoint.shape(name))
        yield name, apply(checkpoint.tensor(name), vector.delta(name), scaling)
