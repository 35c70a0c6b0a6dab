"""Task vectors: extracted, pruned, combined, scaled, and written as a model."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

from lors.errors import ConfigError, CorpusError
from lors.files import write_json
from lors.scaling import choose, higher_is_better, part_of, propose
from lors.stages.common import VECTOR, Report, load, use
from lors.stages.validating import validation_values

__all__ = [
    "add_task_vectors",
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
    from lors.budget import dtype_for, fit_budget
    from lors.delta_file import DeltaFile, write
    from lors.prune import Dtype, Plan, PruneSettings, prune_task_vector

    use(threads)
    own = PruneSettings(**{name: value for name, value in settings.items() if name != "budget"})
    vector = DeltaFile(Path(inputs["task_vector"]) / VECTOR)
    dtype: Dtype = "float32"
    plan: Plan | None = None
    if (budget := settings.get("budget")) is not None:
        dtype = dtype_for(budget, sum(math.prod(vector.shape(name)) for name in vector.names))
        plan = fit_budget(vector.items(), budget, own, dtype)
    pruned = write(
        Path(out) / VECTOR,
        prune_task_vector(vector.items(), own, dtype, plan),
        base_digest=vector.base_digest,
        settings=own,
        provenance=None if budget is None else {"budget": budget},
    )
    return {"retained_energy": round(pruned.retained_energy, 6), "bytes": pruned.path.stat().st_size}


def combine_task_vectors(
    settings: Mapping[str, Any], inputs: Mapping[str, str], places: Mapping[str, Any], out: str, threads: int, **_: Any
) -> dict[str, Any]:
    """The experts' task vectors as one, before the scaling coefficient."""
    from lors.checkpoint import Checkpoint
    from lors.delta_file import write_dense

    use(threads)
    base = Checkpoint(places["base"])
    with _combined(base, inputs, settings["recipe"], settings["weights"], threads, Path(out)) as deltas:
        write_dense(Path(out) / VECTOR, deltas, base_digest=base.digest())
    return {"experts": len(inputs)}


def score_scaling(
    settings: Mapping[str, Any],
    inputs: Mapping[str, str],
    places: Mapping[str, Any],
    out: str,
    threads: int,
    report: Report,
    **_: Any,
) -> dict[str, Any]:
    """One point of the search: the metric of the model with these coefficients, on the validation splits.

    A point of a coordinate starts from the best so far; one that the search has met before is not scored again.
    """
    tried, known = {"scaling": settings.get("scaling"), "factors": settings.get("factors")}, None
    if (coordinate := settings.get("coordinate")) is not None:
        best = _scaling(inputs["best"])
        tried = propose(best, coordinate, settings["factor"])
        known = next((point["values"] for point in best["points"] if all(point[k] == tried[k] for k in tried)), None)
    values = known or _validated(tried, settings, inputs, places, out, threads, report)
    row = {**tried, "coordinate": coordinate, "value": fmean(values.values()), "values": values}
    write_json(Path(out) / "point.json", row)
    return {"value": row["value"]}


def _validated(
    tried: Mapping[str, Any],
    settings: Mapping[str, Any],
    inputs: Mapping[str, str],
    places: Mapping[str, Any],
    out: str,
    threads: int,
    report: Report,
) -> dict[str, float]:
    """The metric by `language-task`."""
    from lors.speech.corpus import read_split

    model, processor = load_merged(places["base"], inputs, settings, tried, threads, Path(out))
    metric, values = settings["metric"], dict[str, float]()
    for number, language in enumerate(settings["languages"]):
        utterances = read_split(Path(inputs[f"corpus-{language}"]) / "validation.parquet")
        values |= validation_values(metric, model, processor, utterances, language, settings)
        report({"done": number + 1, "total": len(settings["languages"]), "unit": "languages"})
    if not values:
        raise CorpusError(
            f"the search by {metric} finds no reference in the validation splits of {', '.join(settings['languages'])} "
            f"for {' and '.join(settings['tasks'])}: give them some, or set another merge.scaling.metric"
        )
    for of, value in values.items():
        if not math.isfinite(value):
            raise ConfigError(
                f"the {metric} of {of} is {value} with the scaling coefficient {tried['scaling']:g}{_said(tried)}: "
                "leave so large a coefficient out of the search"
            )
    return values


def select_scaling(settings: Mapping[str, Any], inputs: Mapping[str, str], out: str, **_: Any) -> dict[str, Any]:
    """The best of the points so far, or the coefficient that was set; and all points in the order tried."""
    metric = settings["metric"]
    higher = metric is not None and higher_is_better(metric)
    points = _scaling(inputs["best"])["points"] if "best" in inputs else []
    new = sorted((name for name in inputs if name != "best"), key=lambda name: int(name.removeprefix("point-")))
    points += [json.loads((Path(inputs[name]) / "point.json").read_text()) for name in new]
    best = choose(points, higher) if points else {"scaling": settings["scaling"], "factors": {}}
    chosen = {name: best[name] for name in ("scaling", "factors")}
    curve = {**chosen, "metric": metric, "higher_is_better": higher, "points": points}
    write_json(Path(out) / "scaling.json", curve)
    return chosen


def write_model(
    settings: Mapping[str, Any],
    inputs: Mapping[str, str],
    places: Mapping[str, Any],
    digests: Mapping[str, str],
    out: str,
    threads: int,
    **_: Any,
) -> dict[str, Any]:
    """The merged model: a complete Hugging Face folder in the base's dtypes."""
    from lors.checkpoint import Checkpoint
    from lors.merging import get_method
    from lors.model_writer import write_model_folder

    use(threads)
    found = _scaling(inputs["scaling"])
    chosen = {name: found[name] for name in ("scaling", "factors")}
    method = get_method(settings["method"])
    written = write_model_folder(
        Path(out),
        Checkpoint(places["base"]),
        _merged(places["base"], inputs, settings, chosen, threads, Path(out).parent),
        title=f"Merged by {method.name}",
        text=f"`{method.formula}` with scaling coefficient {chosen['scaling']:g}{_said(chosen)} ({method.reference}).",
        provenance={"method": method.name, **chosen, "digests": dict(digests)},
    )
    return {"scaling": chosen["scaling"], "parameters": written.parameters}


def add_task_vectors(
    settings: Mapping[str, Any],
    inputs: Mapping[str, str],
    places: Mapping[str, Any],
    digests: Mapping[str, str],
    out: str,
    threads: int,
    **_: Any,
) -> dict[str, Any]:
    """The model `start` with one more language's task vectors on top of it: a complete folder in its dtypes."""
    from lors.checkpoint import Checkpoint
    from lors.model_writer import write_model_folder

    use(threads)
    base, start, chosen = Checkpoint(places["base"]), Checkpoint(inputs["start"]), {"scaling": settings["scaling"]}
    vectors = {expert: inputs[f"vector-{expert}"] for expert in settings["weights"]}
    with _combined(base, vectors, settings["recipe"], settings["weights"], threads, Path(out).parent) as deltas:
        write_model_folder(
            Path(out),
            start,
            _on_top(start, deltas, settings["recipe"]["groups"], {**chosen, "factors": {}}),
            title=f"{' and '.join(vectors)} added",
            text=f"A finished model plus {settings['scaling']:g} times the task vector of {' and '.join(vectors)}.",
            provenance={"added": list(vectors), **chosen, "digests": dict(digests)},
        )
    return chosen


def _scaling(folder: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(folder) / "scaling.json").read_text())
    return found


def _said(chosen: Mapping[str, Any]) -> str:
    """Such as `, times 1.25 for encoder`."""
    return "".join(f", times {factor:g} for {name}" for name, factor in chosen["factors"].items())


def load_merged(
    base: str,
    inputs: Mapping[str, str],
    settings: Mapping[str, Any],
    chosen: Mapping[str, Any],
    threads: int,
    scratch: Path,
) -> tuple[Any, Any]:
    """What `load` gives of the folder that `write_model` makes, without writing it."""
    model, processor = load(base, threads)
    merged = {name: tensor.float() for name, tensor in _merged(base, inputs, settings, chosen, threads, scratch)}
    odd = model.load_state_dict(merged, strict=False).unexpected_keys
    assert not odd, f"the search would score a model without its merged {odd[0]}"
    return model, processor


def _merged(
    base: str,
    inputs: Mapping[str, str],  # `combined`; or `vector-ID` of each expert, where they have factors
    settings: Mapping[str, Any],
    chosen: Mapping[str, Any],  # {"scaling", "factors"}
    threads: int,
    scratch: Path,
) -> Iterator[tuple[str, Any]]:
    """(name, base + scaling * delta in the base's dtype) for every float tensor: the search and the result share it."""
    from lors.checkpoint import Checkpoint
    from lors.delta_file import DeltaFile

    checkpoint, groups = Checkpoint(base), settings["groups"]
    if "combined" in inputs:
        vector = DeltaFile(Path(inputs["combined"]) / VECTOR)
        dense = ((name, vector.delta(name)) for name in checkpoint.float_names)
        yield from _on_top(checkpoint, dense, groups, chosen)
    else:
        factors = chosen["factors"]
        weights = {expert: weight * factors.get(expert, 1.0) for expert, weight in settings["weights"].items()}
        vectors = {expert: inputs[f"vector-{expert}"] for expert in weights}
        with _combined(checkpoint, vectors, settings["recipe"], weights, threads, scratch) as deltas:
            yield from _on_top(checkpoint, deltas, groups, chosen)


def _on_top(
    model: Any,  # a Checkpoint
    deltas: Iterator[tuple[str, Any]],
    groups: Mapping[str, Any],  # of the recipe; one with a coefficient of its own keeps it
    chosen: Mapping[str, Any],  # {"scaling", "factors"}
) -> Iterator[tuple[str, Any]]:
    """(name, model + scaling * delta in the model's dtype)."""
    from lors.merging.recipe import Recipe
    from lors.task_vector import apply

    recipe = Recipe.model_validate({"groups": groups})
    for name, delta in deltas:
        scaling = chosen["scaling"] * chosen["factors"].get(part_of(name), 1.0)
        yield name, apply(model.tensor(name), delta, recipe.scaling_of(name, model.shape(name), scaling))


@contextmanager
def _combined(
    base: Any,  # a Checkpoint
    folders: Mapping[str, str],  # of the task vectors, by expert
    recipe: Mapping[str, Any],
    weights: Mapping[str, float],
    threads: int,
    scratch: Path,
) -> Iterator[Iterator[tuple[str, Any]]]:
    """(name, combined delta) for every float tensor; a vector that was pruned before is taken as it is."""
    from lors.delta_file import DeltaFile
    from lors.merging.engine import Merger
    from lors.merging.recipe import Recipe

    vectors = {expert: DeltaFile(Path(folder) / VECTOR) for expert, folder in folders.items()}
    with Merger(base, vectors, Recipe.model_validate(recipe), weights, workers=threads, scratch=scratch) as merger:
        yield merger.deltas()
