"""Stages in this process, on the starter base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from stage_calls import folder, nothing

from lors import stages
from lors.checkpoint import Checkpoint, check_compatible
from lors.model_writer import write_model_folder
from lors.starter import MODEL_FOLDER

BASE = str(MODEL_FOLDER)


def split(path: Path, name: str, limit: int) -> dict[str, Any]:
    settings = {"language": "es", "split": name, "source": "synthetic", "seed": 3, "limit": limit}
    settings |= {"min_seconds": 0.1, "max_seconds": 4.0, "max_rejected": 0.05}
    return stages.prepare_split(settings, places={}, out=str(folder(path)), report=nothing)


def test_prepared_splits_are_evaluated_and_scored_in_the_given_order(tmp_path: Path) -> None:
    assert split(tmp_path / "corpus", "test", 3)["utterances"] == 3
    assert {path.name for path in (tmp_path / "corpus").iterdir()} == {"test.parquet", "rejects.jsonl"}
    settings = {"language": "es", "tasks": ["transcribe", "translate"], "split": "test", "beams": 1}
    settings |= {"window": "auto", "batch_seconds": 20.0, "backend": "transformers", "identify": True}
    inputs = {"corpus": str(tmp_path / "corpus")}
    out, work = folder(tmp_path / "base"), [str(folder(tmp_path / f"work-{number}")) for number in (1, 2)]
    events: list[Any] = []
    done = stages.evaluate_model(settings, inputs, {"base": BASE}, str(out), work[0], threads=1, report=events.append)
    assert done == {"hypotheses": 6}
    assert events[-1] == {"done": 3, "total": 3, "unit": "utterances"}
    table = pd.read_parquet(out / "hypotheses.parquet")
    assert set(table.task) == {"transcribe", "translate"}
    assert table.reference.str.len().min() > 0
    merged = folder(tmp_path / "merged")
    stages.evaluate_model(settings, {**inputs, "model": BASE}, {"base": "/nowhere"}, str(merged), work[1], 1, nothing)
    pd.testing.assert_frame_equal(table, pd.read_parquet(merged / "hypotheses.parquet"))
    order = ["base/es", "experts/es-transcribe", "lors/es"]
    scored = folder(tmp_path / "scored")
    stages.score_systems(
        {"normaliser": "lors", "guard": [], "order": order},
        {"lors/es": str(merged), "experts/es-transcribe": str(out), "base/es": str(out)},
        str(scored),
    )
    assert list(pd.read_csv(scored / "results.csv").system.unique()) == ["base", "experts", "lors"]
    assert {path.name for path in scored.glob("hypotheses-*")} == {
        f"hypotheses-{system}.parquet" for system in ("base", "experts", "lors")
    }


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
    done = changes.pop("stage", stages.fine_tune)(
        work=work,
        report=events.append,
        settings=settings,
        inputs=inputs,
        places=places,
        digests={},
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


def test_a_limited_validation_is_of_utterances_that_have_a_translation(tmp_path: Path) -> None:
    corpus = tmp_path / "validation-es"
    split(corpus, "validation", 2)
    table = pq.read_table(corpus / "validation.parquet")
    second = pa.array([None, table["translation"][1].as_py()], pa.string())
    place = table.schema.get_field_index("translation")
    pq.write_table(table.set_column(place, table.schema.field(place), second), corpus / "validation.parquet")
    settings = {"parts": [["es", "translate"]], "evaluate": EVALUATE}
    _, done, _ = trained(tmp_path, ["es"], finetune={"validation": {"every": 2, "limit": 1}}, settings=settings)
    assert (done["validation_examples"], done["best_step"]) == (1, 2)


def test_an_expert_is_held_to_the_base_under_the_prompts_of_other_languages(tmp_path: Path) -> None:
    """The prompts are the same in each run, and the expert is another one than without them."""
    held = {"preserve": {"weight": 3.0, "languages": ["es", "it"]}}
    out, *_ = trained(tmp_path, ["es"], finetune=held)
    again, *_ = trained(tmp_path, ["es"], finetune=held)
    free, *_ = trained(tmp_path, ["es"])
    bytes_of = [(folder_ / "model.safetensors").read_bytes() for folder_ in (out, again, free)]
    assert bytes_of[0] == bytes_of[1] != bytes_of[2]


def test_an_expert_is_held_on_speech_of_other_languages(tmp_path: Path) -> None:
    other = folder(tmp_path / "held")
    settings = {"language": "it", "split": "train", "source": "synthetic", "seed": 3, "limit": 6}
    settings |= {"min_seconds": 0.1, "max_seconds": 4.0, "max_rejected": 0.05}
    stages.prepare_split(settings, places={}, out=str(other), report=nothing)
    preserve = {"weight": 3.0, "languages": ["es", "it"]}
    own, *_ = trained(tmp_path, ["es"], finetune={"preserve": preserve})
    held = {"finetune": {"preserve": preserve | {"speech": ["it"]}}, "inputs": {"held-it": str(other)}}
    out, *_ = trained(tmp_path, ["es"], **held)
    again, *_ = trained(tmp_path, ["es"], **held)
    bytes_of = [(folder_ / "model.safetensors").read_bytes() for folder_ in (out, again, own)]
    assert bytes_of[0] == bytes_of[1] != bytes_of[2]


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


def test_a_merged_model_is_touched_up_in_its_own_dtypes(tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    base = Checkpoint(MODEL_FOLDER)
    write_model_folder(merged, base, ((name, base.tensor(name)) for name in base.float_names), title="Merged")
    out, done, events = trained(tmp_path, ["es", "fr"], inputs={"start": str(merged)}, stage=stages.touch_up)
    plain, *_ = trained(tmp_path, ["es", "fr"], inputs={"start": str(merged)})
    assert done["steps"] == len([event for event in events if "loss" in event]) == 2
    touched, free = Checkpoint(out), Checkpoint(plain)
    check_compatible(base, touched)
    assert {name: touched.dtype(name) for name in touched.names} == {name: base.dtype(name) for name in base.names}
    moved = [name for name in base.float_names if not torch.equal(touched.tensor(name), base.tensor(name))]
    assert moved
    for name in moved:
        assert torch.equal(touched.tensor(name), free.tensor(name).to(base.dtype(name)))
    card = (out / "README.md").read_text()
    assert "trained further for 2 updates on es-transcribe and es-translate and fr-transcribe and fr-translate" in card
    assert {"train.jsonl", "tokenizer.json"} <= {path.name for path in out.iterdir()}


def test_a_task_vector_goes_on_top_of_a_model_in_its_dtypes(tmp_path: Path) -> None:
    expert, *_ = trained(tmp_path, ["es"])
    start, *_ = trained(tmp_path, ["fr"])
    base = {"base": BASE}
    vector = folder(tmp_path / "vector")
    stages.extract_task_vector({"expert": str(expert)}, base, {}, str(vector))
    settings = {"recipe": {"method": "task_arithmetic"}, "weights": {"es-transcribe": 2.0}, "scaling": 0.25}
    settings["recipe"] |= {"groups": {"encoder": {"scaling": 0}}}
    inputs, out = {"start": str(start), "vector-es-transcribe": str(vector)}, folder(tmp_path / "added")
    assert stages.add_task_vectors(settings, inputs, base, {}, str(out), threads=1) == {"scaling": 0.25}
    own, before, after, taught = (Checkpoint(path) for path in (MODEL_FOLDER, start, out, expert))
    for name in before.float_names:
        delta = taught.tensor(name).double() - own.tensor(name).double()
        expected = before.tensor(name) + (0 if ".encoder." in name else 0.5) * delta
        torch.testing.assert_close(after.tensor(name), expected.to(before.dtype(name)), rtol=0, atol=1e-6)
        assert after.dtype(name) == before.dtype(name)
    assert "0.25 times the task vector of es-transcribe" in (out / "README.md").read_text()


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
