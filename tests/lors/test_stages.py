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
from safetensors import safe_open

from lors import stages
from lors.stages import merging
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
    searched, _ = merging._load_merged(base, str(combined), {"scaling": 0.37, "groups": GROUPS}, threads=1)
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
        {"normaliser": "lors", "guard": [], "order": order},
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


def trained(folder_: Path, languages: list[str], **changes: Any) -> tuple[Path, dict[str, Any], list[Any]]:
    """A model trained for two updates on both tasks of some languages, its figures and its events."""
    inputs = {}
    for language in languages:
        for name, limit in (("train", 6), ("validation", 2)):
            corpus = folder_ / f"{name}-{language}"
            if not corpus.exists():
                settings = {"language": language, "split": name, "source": "synthetic", "seed": 3, "limit": limit}
                settings |= {"min_seconds": 0.1, "max_seconds": 4.0, "max_rejected": 0.05}
                stages.prepare_split(settings, places={}, out=str(folder(corpus)), report=nothing)
            inputs[f"{name}-{language}"] = str(corpus)
    parts = [[language, task] for language in languages for task in ("transcribe", "translate")]
    finetune = {"steps": 2, "learning_rate": 1e-3, "batch_seconds": 12} | changes.pop("finetune", {})
    settings = {"parts": parts, "finetune": finetune} | changes.pop("settings", {})
    out, events = folder(folder_ / f"out-{len(list(folder_.iterdir()))}"), list[Any]()
    places = {"base": BASE} | changes.pop("places", {})
    work = str(out) + "-work"
    inputs |= changes.pop("inputs", {})
    done = stages.fine_tune(
        work=work,
        report=events.append,
        settings=settings,
        inputs=inputs,
        places=places,
        out=str(out),
        threads=1,
        **changes,
    )
    return out, done, events


EVALUATE = {"beams": 1, "window": "auto", "batch_seconds": 20.0, "normaliser": "lors"}


def test_one_training_on_several_languages_and_tasks_validates_each(tmp_path: Path) -> None:
    finetune = {"validation": {"every": 1, "limit": 1}}
    out, done, events = trained(tmp_path, ["es", "fr"], finetune=finetune, settings={"evaluate": EVALUATE})
    assert (done["steps"], done["train_examples"], done["validation_examples"]) == (2, 24, 8)
    assert done["best_step"] in (1, 2)
    seen = [event for event in events if "validation_score" in event]
    assert [event["step"] for event in seen] == [1, 2]
    assert done["best_value"] == pytest.approx(min(event["validation_score"] for event in seen))
    assert {"model.safetensors", "config.json", "tokenizer.json", "train.jsonl"} <= {p.name for p in out.iterdir()}
    again, *_ = trained(tmp_path, ["es", "fr"], finetune=finetune, settings={"evaluate": EVALUATE})
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_the_encoder_s_positions_are_never_trained(tmp_path: Path) -> None:
    """They are sinusoids, which a window of the native length would train."""
    out, *_ = trained(tmp_path, ["es"], finetune={"window": 30.0, "batch_seconds": 40})
    name = "model.encoder.embed_positions.weight"
    with safe_open(MODEL_FOLDER / "model.safetensors", "pt") as base, safe_open(out / "model.safetensors", "pt") as own:
        assert torch.equal(own.get_tensor(name), base.get_tensor(name).float())
        name = "model.decoder.layer_norm.weight"
        assert not torch.equal(own.get_tensor(name), base.get_tensor(name).float())


def test_a_training_may_start_from_another_and_be_watched(tmp_path: Path) -> None:
    first, *_ = trained(tmp_path, ["es"])
    curves = tmp_path / "curves"
    places = {"base": "/nowhere", "tensorboard": str(curves)}
    second, *_ = trained(tmp_path, ["fr"], inputs={"start": str(first)}, places=places)
    assert any(path.name.startswith("events.out.tfevents") for path in curves.rglob("*"))
    alone, *_ = trained(tmp_path, ["fr"])
    digests = {(folder_ / "model.safetensors").read_bytes() for folder_ in (first, second, alone)}
    assert len(digests) == 3


def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    one, done, events = trained(tmp_path, ["es"])
    two, done_together, events_together = trained(tmp_path, ["es"], processes=2)
    assert done_together["steps"] == done["steps"]
    losses = [[event["loss"] for event in found if "loss" in event] for found in (events, events_together)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    with safe_open(one / "model.safetensors", "pt") as a, safe_open(two / "model.safetensors", "pt") as b:
        assert a.keys() == b.keys()
        for name in a.keys():  # noqa: SIM118 - it is no mapping
            torch.testing.assert_close(a.get_tensor(name), b.get_tensor(name), rtol=1e-3, atol=2e-5)
