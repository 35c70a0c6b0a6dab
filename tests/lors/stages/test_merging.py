"""The search for the scaling coefficients and the models it scores, on the starter base, in this process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from stage_calls import folder, nothing

from lors import stages
from lors.checkpoint import Checkpoint
from lors.delta_file import DeltaFile, write, write_dense
from lors.errors import ConfigError, CorpusError
from lors.files import file_digest
from lors.merging import get_method, make_recipe
from lors.merging.engine import Merger
from lors.merging.folders import merge_folders
from lors.prune import PruneSettings, prune_task_vector
from lors.speech.corpus import read_split
from lors.speech.load import load_model
from lors.stages import merging
from lors.stages.common import VECTOR
from lors.stages.validating import mean_losses
from lors.starter import MODEL_FOLDER

BASE = str(MODEL_FOLDER)
EXPERTS = ("es-transcribe", "fr-transcribe")
GROUPS = {"encoder": {"scaling": 0.1}, "embeddings": {"exclude": True}}
RECIPE = make_recipe("lors", prune=PruneSettings(rank_ratio=0.1, density=0.05))
COMBINING = RECIPE.model_dump(mode="json", exclude={"scaling"})
WEIGHTS = {"es-transcribe": 1.0, "fr-transcribe": 0.5}
ANEW = {"recipe": COMBINING, "weights": WEIGHTS}


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of each expert's pruned task vector of the starter."""
    base, found = Checkpoint(BASE), {}
    for seed, expert in enumerate(EXPERTS):
        generator = torch.Generator().manual_seed(seed)
        deltas = ((n, 0.01 * torch.randn(base.shape(n), generator=generator)) for n in base.float_names)
        found[expert] = tmp_path_factory.mktemp(expert)
        settings = RECIPE.pruning
        assert settings is not None
        pruned = prune_task_vector(deltas, settings)
        write(found[expert] / VECTOR, pruned, base_digest=base.digest(), settings=settings)
    return found


@pytest.fixture(scope="module")
def combined(vectors: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the vectors as one."""
    out = tmp_path_factory.mktemp("combined")
    inputs = {expert: str(place) for expert, place in vectors.items()}
    assert stages.combine_task_vectors(ANEW, inputs, {"base": BASE}, str(out), threads=2) == {"experts": 2}
    return out


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two validation utterances of Spanish."""
    out = tmp_path_factory.mktemp("es")
    settings = {"language": "es", "split": "validation", "source": "synthetic", "seed": 3, "limit": 2}
    settings |= {"min_seconds": 0.1, "max_seconds": 4.0, "max_rejected": 0.05}
    stages.prepare_split(settings, places={}, out=str(out), report=nothing)
    return out


@pytest.mark.parametrize(("budget", "dtype"), [(250_000, "int8"), (3_000_000, "bfloat16")])
def test_a_task_vector_is_pruned_to_a_budget_and_merged(budget: int, dtype: str, tmp_path: Path) -> None:
    """As `lors prune --budget` does; the settings in the file are still those that the recipe names."""
    base = Checkpoint(BASE)
    generator = torch.Generator().manual_seed(0)
    deltas = {n: 0.01 * torch.randn(base.shape(n), generator=generator) for n in base.float_names}
    whole, out, merged = (folder(tmp_path / name) for name in ("whole", "out", "merged"))
    write_dense(whole / VECTOR, deltas.items(), base_digest=base.digest())
    assert RECIPE.pruning is not None
    settings = RECIPE.pruning.model_dump(mode="json") | {"budget": budget}
    done = stages.prune_task_vector(settings, {"task_vector": str(whole)}, str(out), threads=1)
    pruned = DeltaFile(out / VECTOR)
    assert (pruned.dtype, pruned.settings) == (dtype, RECIPE.pruning)
    assert done == {"retained_energy": pytest.approx(pruned.retained_energy, abs=1e-6), "bytes": done["bytes"]}
    assert 0.8 * budget < done["bytes"] <= budget
    alone = {"recipe": COMBINING, "weights": {"es-transcribe": 1.0}}
    stages.combine_task_vectors(alone, {"es-transcribe": str(out)}, {"base": BASE}, str(merged), threads=1)
    name = "model.decoder.layers.0.fc1.weight"
    torch.testing.assert_close(DeltaFile(merged / VECTOR).delta(name), pruned.delta(name))


def chosen(place: Path, scaling: float, points: tuple[Any, ...] = (), **factors: float) -> str:
    """The folder of a step that has selected these coefficients."""
    content = {"scaling": scaling, "factors": factors, "points": points}
    (folder(place) / "scaling.json").write_text(json.dumps(content))
    return str(place)


def written(out: Path, inputs: Mapping[str, str], settings: Mapping[str, Any], base: str = BASE) -> Path:
    """The folder of the model that `write_model` makes."""
    settings = {"method": "lors", "groups": {}, **settings}
    stages.write_model(settings, inputs, {"base": base}, {"combined": "0" * 64}, str(folder(out)), threads=1)
    return out


def tensors(place: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(place)
    return {name: checkpoint.tensor(name) for name in checkpoint.float_names}


def of_experts(vectors: Mapping[str, Path]) -> dict[str, str]:
    return {f"vector-{expert}": str(place) for expert, place in vectors.items()}


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_the_search_scores_the_very_model_that_is_written(half: bool, combined: Path, tmp_path: Path) -> None:
    base = BASE
    if half:
        model, _ = load_model(MODEL_FOLDER)
        base = str(shutil.copytree(MODEL_FOLDER, tmp_path / "base"))
        model.to(torch.bfloat16).save_pretrained(base)
    scaling = chosen(tmp_path / "scaling", 0.37, decoder=1.25)
    inputs = {"combined": str(combined), "scaling": scaling}
    out = written(tmp_path / "out", inputs, {"groups": GROUPS}, base)
    coefficients = {"scaling": 0.37, "factors": {"decoder": 1.25}}
    searched, _ = merging.load_merged(base, inputs, {"groups": GROUPS}, coefficients, 1, tmp_path)
    model, processor = load_model(out)
    mine, theirs = searched.state_dict(), model.state_dict()
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
    original, _ = load_model(Path(base))
    assert not torch.equal(original.model.encoder.conv1.weight, model.model.encoder.conv1.weight)
    assert torch.equal(original.model.decoder.embed_tokens.weight, model.model.decoder.embed_tokens.weight)
    assert processor.tokenizer.convert_tokens_to_ids("<|es|>") == original.generation_config.lang_to_id["<|es|>"]
    card = (out / "README.md").read_text()
    assert get_method("lors").reference in card
    assert "scaling coefficient 0.37, times 1.25 for decoder (" in card


def test_parts_are_scaled_as_a_merge_with_coefficients_of_groups(
    vectors: Mapping[str, Path], combined: Path, tmp_path: Path
) -> None:
    inputs = {"combined": str(combined), "scaling": chosen(tmp_path / "scaling", 0.4, encoder=1.5, decoder=0.5)}
    mine = tensors(written(tmp_path / "mine", inputs, {}))
    groups = {"encoder": {"scaling": 0.4 * 1.5}, "decoder": {"scaling": 0.4 * 0.5}}
    files = {expert: place / VECTOR for expert, place in vectors.items()}
    recipe = make_recipe("lors", prune=RECIPE.pruning, groups=groups)
    reference = tensors(merge_folders(BASE, files, tmp_path / "reference", recipe, weights=WEIGHTS).out)
    torch.testing.assert_close(mine, reference, rtol=1e-6, atol=1e-8)
    fixed = tensors(written(tmp_path / "fixed", inputs, {"groups": {"encoder": {"scaling": 0.3}}}))
    base = Checkpoint(BASE)
    with Merger(base, {e: DeltaFile(p / VECTOR) for e, p in vectors.items()}, RECIPE, WEIGHTS) as merger:
        for name, delta in merger.deltas():
            if name.startswith("model.encoder"):  # set by the user: the search leaves it alone
                torch.testing.assert_close(fixed[name], base.tensor(name) + 0.3 * delta)
            else:
                assert torch.equal(fixed[name], mine[name])


def test_experts_are_scaled_by_their_merge_weights_and_never_pruned_again(
    vectors: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {expert: place / VECTOR for expert, place in vectors.items()}
    weights = {"es-transcribe": 1.0 * 0.5, "fr-transcribe": 0.5 * 1.25}
    recipe = RECIPE.model_copy(update={"scaling": 0.7})
    reference = tensors(merge_folders(BASE, files, tmp_path / "reference", recipe, weights=weights).out)

    def fail(*_: Any) -> None:
        raise AssertionError("pruned again")

    monkeypatch.setattr("lors.merging.engine.prune_delta", fail)
    scaling = chosen(tmp_path / "scaling", 0.7, **{"es-transcribe": 0.5, "fr-transcribe": 1.25})
    mine = tensors(written(tmp_path / "mine", {**of_experts(vectors), "scaling": scaling}, ANEW))
    torch.testing.assert_close(mine, reference, rtol=1e-6, atol=1e-8)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_without_factors_all_ways_write_the_same_bytes(
    vectors: Mapping[str, Path], combined: Path, tmp_path: Path
) -> None:
    scaling = chosen(tmp_path / "scaling", 1.0)
    ways: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
        "model": ({"combined": str(combined)}, {}),
        "expert": (of_experts(vectors), ANEW),
    }
    ones = chosen(tmp_path / "ones", 1.0, encoder=1.0, decoder=1.0)
    outs = [written(tmp_path / name, {**own, "scaling": scaling}, more) for name, (own, more) in ways.items()]
    outs.append(written(tmp_path / "part", {"combined": str(combined), "scaling": ones}, {}))
    assert len({file_digest(out / "model.safetensors") for out in outs}) == 1
    base, plain = Checkpoint(BASE), tensors(outs[0])
    with Merger(base, {e: DeltaFile(p / VECTOR) for e, p in vectors.items()}, RECIPE, WEIGHTS) as merger:
        for name, delta in merger.deltas():
            assert torch.equal(plain[name], (base.tensor(name).double() + delta.double()).float())


# Points


SETTINGS = {"tasks": ["transcribe", "translate"], "languages": ["es"], "groups": {}, "normaliser": "lors"}
SETTINGS |= {"beams": 1, "window": "auto", "batch_seconds": 20.0}


def point(out: Path, inputs: Mapping[str, str], **settings: Any) -> dict[str, Any]:
    """What a point of the search wrote."""
    place = str(folder(out))
    done = stages.score_scaling({**SETTINGS, **settings}, inputs, {"base": BASE}, place, threads=1, report=nothing)
    assert {path.name for path in out.iterdir()} == {"point.json"}
    row: dict[str, Any] = json.loads((out / "point.json").read_text())
    assert done == {"value": row["value"]}
    return row


@pytest.mark.parametrize(
    ("metric", "tasks"),
    [
        ("score", ("transcribe", "translate")),
        ("loss", ("transcribe", "translate")),
        *(("wer", ("transcribe",)), ("cer", ("transcribe",)), ("bleu", ("translate",)), ("chrf", ("translate",))),
    ],
)
def test_a_point_is_the_mean_of_its_languages_and_tasks(
    metric: str, tasks: tuple[str, ...], combined: Path, corpus: Path, tmp_path: Path
) -> None:
    inputs = {"combined": str(combined), "corpus-es": str(corpus)}
    row = point(tmp_path / "out", inputs, metric=metric, scaling=0.2, factors={})
    assert (row["scaling"], row["factors"], row["coordinate"]) == (0.2, {}, None)
    assert row["values"].keys() == {f"es-{task}" for task in tasks}
    assert row["value"] == pytest.approx(fmean(row["values"].values()))
    assert all(value > 0 for value in row["values"].values())


def test_a_metric_without_references_is_refused(combined: Path, corpus: Path, tmp_path: Path) -> None:
    inputs = {"combined": str(combined), "corpus-es": str(corpus)}
    with pytest.raises(CorpusError, match=r"search by bleu finds no reference .* es for transcribe"):
        point(tmp_path / "out", inputs, metric="bleu", tasks=["transcribe"], scaling=0.2, factors={})


def test_a_model_that_is_no_longer_finite_is_named(combined: Path, corpus: Path, tmp_path: Path) -> None:
    inputs = {"combined": str(combined), "corpus-es": str(corpus)}
    with pytest.raises(ConfigError, match=r"the loss of es-transcribe is nan with the scaling coefficient 1e\+30"):
        point(tmp_path / "out", inputs, metric="loss", tasks=["transcribe"], scaling=1e30, factors={})


@pytest.mark.parametrize("per", ["part", "expert"])
def test_a_coordinate_s_point_starts_from_the_best_and_a_known_one_is_not_scored_again(
    per: str,
    vectors: Mapping[str, Path],
    combined: Path,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    coordinate = "encoder" if per == "part" else "fr-transcribe"
    anew: dict[str, Any] = {} if per == "part" else ANEW
    inputs = {"corpus-es": str(corpus)} | ({"combined": str(combined)} if per == "part" else of_experts(vectors))
    measure = {"metric": "loss", "tasks": ["transcribe"]}
    first = point(tmp_path / "first", {**inputs, "combined": str(combined)}, scaling=0.3, factors={}, **measure)
    inputs["best"] = chosen(tmp_path / "best", 0.3, (first,))
    moved = point(tmp_path / "moved", inputs, coordinate=coordinate, factor=4.0, **measure, **anew)
    assert (moved["scaling"], moved["factors"], moved["coordinate"]) == (0.3, {coordinate: 4.0}, coordinate)
    assert moved["value"] != first["value"]
    scaling = {"scaling": chosen(tmp_path / "scaling", 0.3, **{coordinate: 4.0})}
    model, processor = load_model(written(tmp_path / "model", inputs | scaling, anew))
    spoken = read_split(corpus / "validation.parquet")
    assert mean_losses(model, processor, spoken, "es", {**SETTINGS, **measure}) == moved["values"]

    def fail(*_: Any) -> None:
        raise AssertionError("scored again")

    monkeypatch.setattr(merging, "load_merged", fail)
    inputs["best"] = chosen(tmp_path / "second", 0.3, (first, moved), **{coordinate: 4.0})
    back = point(tmp_path / "back", inputs, coordinate=coordinate, factor=0.25, **measure, **anew)
    assert back == first | {"coordinate": coordinate}
    assert point(tmp_path / "same", inputs, coordinate=coordinate, factor=1.0, **measure, **anew) == moved


# What is selected


def points(place: Path, *rows: tuple[float, float, dict[str, float]]) -> dict[str, str]:
    """The inputs of these points: scaling, value, factors."""
    found = {}
    for number, (scaling, value, factors) in enumerate(rows):
        out = folder(place / str(number))
        row = {"scaling": scaling, "factors": factors, "coordinate": None, "value": value, "values": {"es": value}}
        (out / "point.json").write_text(json.dumps(row))
        found[f"point-{number:03d}"] = str(out)
    return found


@pytest.mark.parametrize(
    ("metric", "rows", "best"),
    [
        ("score", {0.2: 50.0, 0.5: 40.0, 0.8: 45.0}, 0.5),
        ("loss", {0.8: 40.0, 0.5: 40.0, 0.2: 41.0}, 0.5),
        ("wer", {0.3: 7.0}, 0.3),
        ("bleu", {0.2: 10.0, 0.5: 30.0, 0.8: 20.0}, 0.5),
        ("chrf", {0.8: 41.0, 0.5: 41.0, 0.2: 40.0}, 0.5),
    ],
)
def test_the_best_is_selected_and_the_smaller_of_equals(
    metric: str, rows: dict[float, float], best: float, tmp_path: Path
) -> None:
    out = folder(tmp_path / "out")
    settings = {"method": "lors", "metric": metric, "scaling": None}
    inputs = points(tmp_path, *((scaling, value, {}) for scaling, value in rows.items()))
    assert stages.select_scaling(settings, dict(reversed(inputs.items())), str(out)) == {"scaling": best, "factors": {}}
    curve = json.loads((out / "scaling.json").read_text())
    assert (curve["scaling"], curve["factors"], curve["metric"]) == (best, {}, metric)
    assert curve["higher_is_better"] == (metric in {"bleu", "chrf"})
    assert [row["scaling"] for row in curve["points"]] == [*rows]


def test_a_later_round_keeps_the_curve_and_moves_only_where_it_gains(tmp_path: Path) -> None:
    settings = {"method": "lors", "metric": "bleu", "scaling": None}
    first, second, third = (folder(tmp_path / name) for name in ("first", "second", "third"))
    stages.select_scaling(settings, points(tmp_path / "a", (0.3, 20.0, {}), (0.6, 15.0, {})), str(first))
    even = points(tmp_path / "b", (0.3, 20.0, {"encoder": 0.5}))
    stayed = stages.select_scaling(settings, {"best": str(first), **even}, str(second))
    assert stayed == {"scaling": 0.3, "factors": {}}
    gain = points(tmp_path / "c", (0.3, 20.5, {"decoder": 1.5}))
    moved = stages.select_scaling(settings, {**gain, "best": str(second)}, str(third))
    assert moved == {"scaling": 0.3, "factors": {"decoder": 1.5}}
    curve = json.loads((third / "scaling.json").read_text())
    assert [row["value"] for row in curve["points"]] == [20.0, 15.0, 20.0, 20.5]


def test_a_scaling_that_was_set_is_selected(tmp_path: Path) -> None:
    settings = {"method": "lors", "metric": None, "scaling": 0.0}
    assert stages.select_scaling(settings, {}, str(tmp_path)) == {"scaling": 0.0, "factors": {}}
    curve = {"scaling": 0.0, "factors": {}, "metric": None, "higher_is_better": False, "points": []}
    assert json.loads((tmp_path / "scaling.json").read_text()) == curve
