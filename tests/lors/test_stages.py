"""Stages in this process, on the starter base."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from lors import stages
from lors.checkpoint import Checkpoint
from lors.delta_file import write_dense
from lors.merging import get_method
from lors.speech.load import load_model
from lors.starter import MODEL_FOLDER

BASE = str(MODEL_FOLDER)


@pytest.fixture(autouse=True)
def own_numerics() -> Iterator[None]:
    """Stages set up the process that they have to themselves; other tests share this one."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


def nothing(event: Any) -> None:
    """Take no notice of progress."""


GROUPS = {"encoder": {"scaling": 0.1}, "embeddings": {"exclude": True}}


def folder(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


@pytest.fixture(scope="module")
def combined(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a combined task vector of the starter."""
    base, out = Checkpoint(BASE), tmp_path_factory.mktemp("combined")
    generator = torch.Generator().manual_seed(1)

    def deltas() -> Iterator[tuple[str, torch.Tensor]]:
        for name in base.float_names:
            yield name, 0.01 * torch.randn(base.shape(name), generator=generator)

    write_dense(out / "task_vector.safetensors", deltas(), base_digest=base.digest())
    return out


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_the_search_scores_the_very_model_that_is_written(half: bool, combined: Path, tmp_path: Path) -> None:
    base = BASE
    if half:
        model, _ = load_model(MODEL_FOLDER)
        base = str(shutil.copytree(MODEL_FOLDER, tmp_path / "base"))
        model.to(torch.bfloat16).save_pretrained(base)
    scaling = folder(tmp_path / "scaling")
    (scaling / "scaling.json").write_text(json.dumps({"scaling": 0.37}))
    written = stages.write_model(
        settings={"method": "lors", "groups": GROUPS},
        inputs={"combined": str(combined), "scaling": str(scaling)},
        places={"base": base},
        digests={"combined": "0" * 64},
        out=str(folder(tmp_path / "out")),
    )
    assert written["scaling"] == 0.37
    searched, _ = stages._load_merged(base, str(combined), {"scaling": 0.37, "groups": GROUPS}, threads=1)
    model, processor = load_model(tmp_path / "out")
    mine, theirs = searched.state_dict(), model.state_dict()
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
    original, _ = load_model(Path(base))
    assert not torch.equal(original.model.encoder.conv1.weight, model.model.encoder.conv1.weight)
    assert torch.equal(original.model.decoder.embed_tokens.weight, model.model.decoder.embed_tokens.weight)
    assert processor.tokenizer.convert_tokens_to_ids("<|es|>") == original.generation_config.lang_to_id["<|es|>"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert get_method("lors").reference in card
    assert "0.37" in card


def points(tmp_path: Path, errors: dict[float, float]) -> dict[str, str]:
    places = {}
    for scaling, error in errors.items():
        place = folder(tmp_path / f"at-{scaling}")
        (place / "point.json").write_text(json.dumps({"scaling": scaling, "error": error, "errors": {}}))
        places[str(scaling)] = str(place)
    return places


@pytest.mark.parametrize(
    ("errors", "chosen"),
    [({0.2: 50.0, 0.5: 40.0, 0.8: 45.0}, 0.5), ({0.8: 40.0, 0.5: 40.0, 0.2: 41.0}, 0.5), ({0.3: 7.0}, 0.3)],
)
def test_the_least_error_is_selected_and_the_smaller_of_equals(
    errors: dict[float, float], chosen: float, tmp_path: Path
) -> None:
    out = folder(tmp_path / "out")
    settings = {"method": "lors", "scaling": None}
    assert stages.select_scaling(settings, points(tmp_path, errors), str(out)) == {"scaling": chosen}
    written = json.loads((out / "scaling.json").read_text())
    assert written["scaling"] == chosen
    assert [point["scaling"] for point in written["points"]] == sorted(errors)


def test_a_scaling_that_was_set_is_selected(tmp_path: Path) -> None:
    assert stages.select_scaling({"method": "lors", "scaling": 0.0}, {}, str(tmp_path)) == {"scaling": 0.0}
    assert json.loads((tmp_path / "scaling.json").read_text()) == {"scaling": 0.0, "points": []}


def split(path: Path, name: str, limit: int) -> dict[str, Any]:
    settings = {"language": "es", "split": name, "source": "synthetic", "seed": 3, "limit": limit}
    settings |= {"min_seconds": 0.1, "max_seconds": 4.0, "max_rejected": 0.05}
    return stages.prepare_split(settings, places={}, out=str(folder(path)), report=nothing)


def test_prepared_splits_are_evaluated_and_scored_in_the_given_order(tmp_path: Path) -> None:
    assert split(tmp_path / "corpus", "test", 3)["utterances"] == 3
    assert {path.name for path in (tmp_path / "corpus").iterdir()} == {"test.parquet", "rejects.jsonl"}
    settings = {"language": "es", "tasks": ["transcribe", "translate"], "split": "test", "beams": 1}
    settings |= {"window": "auto", "batch_seconds": 20.0}
    inputs = {"corpus": str(tmp_path / "corpus")}
    out = folder(tmp_path / "base")
    events: list[Any] = []
    done = stages.evaluate_model(settings, inputs, {"base": BASE}, str(out), threads=1, report=events.append)
    assert done == {"hypotheses": 6}
    assert events[-1] == {"done": 3, "total": 3, "unit": "utterances"}
    table = pd.read_parquet(out / "hypotheses.parquet")
    assert set(table.task) == {"transcribe", "translate"}
    assert table.reference.str.len().min() > 0
    merged = folder(tmp_path / "merged")
    stages.evaluate_model(settings, {**inputs, "model": BASE}, {"base": "/nowhere"}, str(merged), 1, nothing)
    pd.testing.assert_frame_equal(table, pd.read_parquet(merged / "hypotheses.parquet"))
    order = ["base-es", "experts-es-transcribe", "lors-es"]
    scored = folder(tmp_path / "scored")
    stages.score_systems(
        {"normaliser": "lors", "order": order},
        {"lors-es": str(merged), "experts-es-transcribe": str(out), "base-es": str(out)},
        str(scored),
    )
    assert list(pd.read_csv(scored / "results.csv").system.unique()) == ["base", "experts", "lors"]
    assert {path.name for path in scored.glob("hypotheses-*")} == {
        f"hypotheses-{system}.parquet" for system in ("base", "experts", "lors")
    }


@pytest.mark.parametrize("metric", ["score", "loss"])
def test_a_point_of_the_search_is_the_mean_of_its_languages_and_tasks(
    metric: str, combined: Path, tmp_path: Path
) -> None:
    split(tmp_path / "es", "validation", 2)
    out = folder(tmp_path / "out")
    settings = {"scaling": 0.2, "metric": metric, "tasks": ["transcribe", "translate"], "languages": ["es"]}
    settings |= {"beams": 1, "window": "auto", "batch_seconds": 20.0, "normaliser": "lors", "groups": {}}
    inputs = {"combined": str(combined), "corpus-es": str(tmp_path / "es")}
    done = stages.score_scaling(settings, inputs, {"base": BASE}, str(out), threads=1, report=nothing)
    point = json.loads((out / "point.json").read_text())
    assert point["scaling"] == 0.2
    assert point["errors"].keys() == {"es-transcribe", "es-translate"}
    assert done["error"] == point["error"] == pytest.approx(sum(point["errors"].values()) / 2)
    assert all(error > 0 for error in point["errors"].values())
