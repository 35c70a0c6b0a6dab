"""The flows on a real tiny experiment."""

from __future__ import annotations

import base64
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from flows_helpers import Done, planned
from huggingface_hub import ModelCard
from prefect.client.orchestration import get_client

import lors
from flows.pipeline import full_pipeline, merge_and_evaluate, sweep, train_baselines, train_expert
from lors.config import Experiment
from lors.errors import InputError
from lors.pipeline import build_steps
from lors.store import Artifact, Store
from lors.sweep import Variant
from lors.versions import history

EXPERTS = ("es-transcribe", "es-translate", "fr-transcribe", "fr-translate")


def summary_of(experiment: Experiment) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((experiment.output / "summary.json").read_text())
    return summary


def ran(experiment: Experiment) -> set[str]:
    return {step["name"] for step in summary_of(experiment)["steps"] if step["state"] == "run"}


def task_states(flow: str, count: int) -> list[str]:
    """The names of the states of the last flow run of a flow, once the API has recorded how all task runs ended."""
    end = time.monotonic() + 30
    with get_client(sync_client=True) as client:
        runs = client.request("POST", "/flow_runs/filter", json={"sort": "START_TIME_DESC", "limit": 20}).json()
        last = next(run for run in runs if run["name"].startswith(flow))
        assert "lors" in last["tags"]
        query = {"task_runs": {"flow_run_id": {"any_": [last["id"]]}}}
        while True:
            found = client.request("POST", "/task_runs/filter", json=query).json()
            states = [run["state_name"] for run in found if run["state_type"] in ("COMPLETED", "FAILED")]
            if len(states) == count or time.monotonic() > end:
                return states
            time.sleep(0.1)


def test_the_first_run_computes_what_was_planned(done: Done) -> None:
    assert done.planned == set(done.result["computed"])
    assert {f"fine-tune {expert}" for expert in EXPERTS} <= done.planned
    assert [step["state"] for step in done.summary["steps"]] == ["run"] * len(done.planned)


def test_the_output_is_complete(done: Done) -> None:
    out = done.folder / "out"
    results = pd.read_csv(out / "results.csv")
    columns = "system language task split metric normaliser value low high p_base signature utterances window"
    assert set(columns.split()) <= set(results.columns)
    assert set(results.system) == {"base", "experts", "switched", "lors"}
    for path in (out, out / "results.csv", out / "results.json"):
        pd.testing.assert_frame_equal(lors.load_results(path), lors.load_results(out / "results.parquet"))
    assert {"wer", "cer", "bleu"} <= set(results.metric)
    assert set(results.language) == {"es", "fr"}
    summary = done.summary
    assert set(summary["systems"]) == {"base", "experts", "switched", "lors"}
    assert {"recovery", "wer", "bleu"} <= set(summary["systems"]["lors"])
    assert summary["scaling"] in (0.3, 0.6)
    assert {point["scaling"] for point in summary["curves"]["lors"]["points"]} == {0.3, 0.6}
    assert {"name", "key", "state", "seconds"} <= set(summary["steps"][0])
    assert set(summary["digests"]) == done.planned
    assert summary["corpora"]["fr"]["train"]["utterances"] == 6
    assert summary["versions"]["torch"]
    assert summary["seeds"] == {"finetune": 0, "corpora": 1}
    assert {path.name for path in (out / "experts").iterdir()} == {f"{expert}.safetensors" for expert in EXPERTS}
    assert {path.stem for path in (out / "hypotheses").iterdir()} == {"base", "experts", "switched", "lors"}
    hypotheses = pd.read_parquet(out / "hypotheses" / "lors.parquet")
    assert len(hypotheses) == 2 * 2 * 3
    assert {"reference", "hypothesis", "spoken", "free"} <= set(hypotheses.columns)
    card = ModelCard.load(out / "model" / "README.md")
    assert (out / "table.md").read_text().strip() in card.content
    assert {(entry.dataset_config, entry.metric_type) for entry in card.data.eval_results} == {
        (language, metric) for language in ("es", "fr") for metric in ("wer", "cer", "bleu", "chrf")
    }
    assert summary["sizes"]["experts"].keys() == set(EXPERTS)
    assert summary["seconds"] > 0
    training = pd.read_csv(out / "training.csv")
    assert set(training.model) == set(EXPERTS)
    assert json.loads((out / "diagnosis.json").read_text())
    report = (out / "report.html").read_text()
    assert "http://" not in report.replace("http://www.w3.org", "")
    assert all(name in report for name in ("switched", "weight", *EXPERTS))
    assert [path.name for path in out.rglob(".*")] == [".lock"]


def test_the_merged_model_is_a_plain_hugging_face_model(done: Done) -> None:
    from transformers import pipeline

    from lors.speech.corpus import read_split

    store = Store(done.folder / "store")
    steps = {step["name"]: step for step in done.summary["steps"]}
    test = store.find("prepare_split", steps["prepare es test"]["key"])
    assert test is not None
    utterance = read_split(store.path(test) / "test.parquet")[0]
    recogniser = pipeline("automatic-speech-recognition", model=str(done.folder / "out" / "model"), device="cpu")
    text = recogniser(utterance.audio(), generate_kwargs={"language": "es", "task": "transcribe"})["text"]
    assert isinstance(text, str)
    assert text.strip()


def test_the_second_run_computes_nothing(done: Done) -> None:
    experiment = done.make()
    assert planned(experiment) == set()
    digests = summary_of(experiment)["digests"]
    assert full_pipeline(experiment)["computed"] == []
    assert ran(experiment) == set()
    assert summary_of(experiment)["digests"] == digests
    assert task_states("full-pipeline", len(done.planned)) == ["Cached"] * len(done.planned)


def test_another_rank_ratio_prunes_merges_and_evaluates_as_planned(done: Done) -> None:
    other = done.make(prune={"rank_ratio": 0.02, "density": 0.01}, output=str(done.folder / "other-rank"))
    expected = {f"prune {expert}" for expert in EXPERTS} | {
        *("combine lors", "score lors at 0.3", "score lors at 0.6", "select scaling lors", "write lors"),
        *("evaluate lors es", "evaluate lors fr", "score systems"),
        *(f"evaluate switched {expert}" for expert in EXPERTS),
    }
    assert planned(other) == expected
    assert set(full_pipeline(other)["computed"]) == expected == ran(other)
    assert planned(done.make()) == set()


def test_more_speech_of_one_language_trains_that_language_as_planned(done: Done) -> None:
    counts = {"source": "synthetic", "utterances": {"train": 6, "validation": 2, "test": 3}}
    changes = {"corpora": counts | {"overrides": {"es": {"train": 7}}}, "merge": {"scaling": 0.5}}
    other = done.make(**changes, output=str(done.folder / "more-speech"))
    expected = planned(other)
    assert {step for step in expected if "fr" in step} == {"evaluate lors fr"}
    assert "diagnose experts" in expected
    assert {"prepare es train", "fine-tune es-transcribe", "fine-tune es-translate"} <= expected
    assert not {"prepare es test", "evaluate base es"} & expected
    assert set(full_pipeline(other)["computed"]) == expected == ran(other)


def test_baselines_and_guard_languages_run_in_the_same_graph(done: Done) -> None:
    changes = {
        "baselines": ["multitask", "sequential"],
        "sequence": ["fr", "es"],
        "evaluate": {"batch_seconds": 20, "guard": ["it"]},
    }
    other = done.make(**changes, output=str(done.folder / "baselines"))
    expected = planned(other)
    assert {step for step in expected if step.startswith("fine-tune")} == {
        "fine-tune multitask",
        "fine-tune sequential fr",
        "fine-tune sequential es",
    }
    trained = train_baselines(other)
    assert trained.keys() == {"multitask", "sequential"}
    rest = planned(other)
    assert expected - rest == {step for step in expected if step.startswith("fine-tune")}
    assert set(merge_and_evaluate(other)["computed"]) == rest
    summary = summary_of(other)
    assert list(summary["systems"]) == ["base", "experts", "multitask", "sequential", "lors"]
    assert summary["guard"]["languages"] == ["it"]
    assert list(summary["guard"]["systems"]) == ["base", "multitask", "sequential", "lors"]
    assert summary["corpora"]["it"].keys() == {"test"}
    assert trained["multitask"]["summary"]["steps"] == 8
    assert (other.output / "table.md").read_text().splitlines()[0].endswith("| guard it WER | guard it BLEU |")
    assert {path.stem for path in (other.output / "hypotheses").iterdir()} == set(summary["systems"])
    assert planned(other) == set()
    with pytest.raises(
        InputError, match="`baselines` names none that is trained: add one of multitask, multitask_held, sequential"
    ):
        train_baselines(done.make())


def test_the_results_are_seen_in_the_api(done: Done) -> None:
    keys = ["lors-results", "lors-scores", "lors-report", "lors-recovery", "lors-scaling"]
    with get_client(sync_client=True) as client:
        found = client.request("POST", "/artifacts/filter", json={"artifacts": {"key": {"any_": keys}}}).json()
    by_key = {key: [artifact["data"] for artifact in found if artifact["key"] == key] for key in keys}
    assert any((done.folder / "out" / "table.md").read_text().strip() in shown for shown in by_key["lors-results"])
    assert any("report.html" in shown for shown in by_key["lors-report"])
    rows = json.loads(by_key["lors-scores"][0])
    assert {"system", "language", "metric", "value"} <= rows[0].keys()
    assert "](data:image/svg+xml;base64," in by_key["lors-scaling"][0]


def test_seeds_and_a_grid_share_what_they_can(done: Done) -> None:
    alone: dict[str, Any] = {"languages": ["es"], "tasks": ["transcribe"], "merge": {"scaling": 0.5}, "diagnose": False}
    other = done.make(**alone, seeds=[0, 1], output=str(done.folder / "seeds"))
    computed = set(full_pipeline(other)["computed"])
    assert "fine-tune es-transcribe [seed=1]" in computed
    assert not {"fine-tune es-transcribe", "prepare es train", "prune es-transcribe"} & computed
    listed = json.loads((other.output / "sweep.json").read_text())
    assert [variant["folder"] for variant in listed["variants"]] == ["seed=0", "seed=1"]
    assert {row["seeds"] for row in listed["means"]} == {2}
    assert {"seed=0", "seed=1", "results.csv", "report.html", "table.md"} <= {p.name for p in other.output.iterdir()}
    assert (other.output / "seed=1" / "model" / "model.safetensors").is_file()
    assert set(lors.load_results(other.output).seed) == {0, 1}

    points = [
        Variant(
            name=f"density={density}",
            changes={"prune.density": density},
            experiment=done.make(
                **alone,
                prune={"rank_ratio": 0.1, "density": density},
                output=str(done.folder / "grid" / f"density={density}"),
            ),
        )
        for density in (0.1, 0.05)
    ]
    assert {name for name in sweep(points, done.folder / "grid")["computed"] if "fine-tune" in name} == set()
    results = lors.load_results(done.folder / "grid")
    assert next(iter(results.columns)) == "prune.density"
    assert set(results["prune.density"]) == {0.1, 0.05}
    assert not (done.folder / "grid" / "density=0.1" / "model").exists()  # a sweep is for the numbers
    assert "density=0.05" in (done.folder / "grid" / "report.html").read_text()

    results = (done.folder / "out" / "results.csv").read_bytes()
    with pytest.raises(InputError, match="holds a run of one model"):
        sweep(points, done.folder / "out")
    with pytest.raises(InputError, match="holds a run of one model"):
        full_pipeline(done.make(**alone, seeds=[0, 1]))
    full_pipeline(done.make(**alone, output=str(done.folder / "grid")))
    assert "density=0.05" not in (done.folder / "grid" / "report.html").read_text()
    assert (done.folder / "out" / "results.csv").read_bytes() == results


def test_a_training_is_seen_in_the_api(done: Done) -> None:
    query = {"artifacts": {"key": {"any_": ["fine-tune-es-transcribe-progress", "fine-tune-es-transcribe-loss"]}}}
    with get_client(sync_client=True) as client:
        found = client.request("POST", "/artifacts/filter", json=query).json()
    # Trainings of other tests, some of them killed, may have shown themselves to the same API.
    assert 100.0 in [artifact["data"] for artifact in found if artifact["type"] == "progress"]
    shown = [artifact["data"] for artifact in found if artifact["type"] == "markdown"]
    assert any(text.startswith("100 %, step 2: loss ") for text in shown)
    for text in shown:
        assert b"<polyline" in base64.b64decode(text.rpartition("data:image/svg+xml;base64,")[2].rstrip(")\n"))


@pytest.mark.parametrize("step", ["prune es-transcribe", "prepare fr test"])
def test_a_damaged_entry_is_made_again_with_the_same_digest(step: str, done: Done) -> None:
    experiment, store = done.make(), Store(done.folder / "store")
    entry = next(entry for entry in done.summary["steps"] if entry["name"] == step)
    files = store.root / "entries" / entry["stage"] / entry["key"] / "files"
    damaged = max(files.iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    assert step in planned(experiment)
    assert full_pipeline(experiment)["computed"] == [step]
    assert summary_of(experiment)["digests"] == done.summary["digests"]
    assert planned(experiment) == set()


def test_a_deleted_output_is_written_again_from_the_store(done: Done) -> None:
    experiment = done.make()
    before = {path.relative_to(experiment.output): path.read_bytes() for path in files_of(experiment.output)}
    shutil.rmtree(experiment.output)
    assert merge_and_evaluate(experiment)["computed"] == []
    after = {path.relative_to(experiment.output): path.read_bytes() for path in files_of(experiment.output)}
    assert after.keys() == before.keys()
    changed = {str(path) for path in after if after[path] != before[path]}
    assert changed <= {".lock", "report.html", "summary.json", "version.json"}


def files_of(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_an_output_of_another_experiment_is_replaced(done: Done) -> None:
    alone = done.make(languages=["es"], tasks=["transcribe"], merge={"scaling": 0.5, "method": "weight_average"})
    full_pipeline(alone)
    assert [path.name for path in (alone.output / "experts").iterdir()] == ["es-transcribe.safetensors"]
    assert {path.stem for path in (alone.output / "hypotheses").iterdir()} == {
        *("base", "experts"),
        *("switched", "weight_average"),
    }
    assert "weight_average" in (alone.output / "model" / "README.md").read_text()
    full_pipeline(done.make())
    assert len(list((alone.output / "experts").iterdir())) == 4
    assert "weight_average" not in (alone.output / "model" / "README.md").read_text()
    assert [path.name for path in alone.output.rglob(".*")] == [".lock"]


def test_the_touched_up_model_is_the_one_that_is_written(done: Done) -> None:
    touch_up = {"steps": 2, "scaling": 0.6, "validation": {"every": 2, "metric": "loss"}}
    own = {"scaling": {"search": [0.3, 0.6], "metric": "loss"}, "touch_up": touch_up}
    touched = done.make(merge=own, output=str(done.folder / "touched"))
    before = planned(touched)
    assert set(full_pipeline(touched)["computed"]) == before
    start = {"select scaling lors to touch up", "write lors to touch up"}
    assert before == {*start, "touch up", "evaluate touched_up es", "evaluate touched_up fr", "score systems"}
    summary = summary_of(touched)
    assert summary["model"] == "touched_up, in model/"
    assert list(summary["systems"])[-2:] == ["lors", "touched_up"]
    (version,) = history(touched.output)
    assert version["model"] == summary["digests"]["touch up"]
    assert (version["method"], version["touched_up"], version["scaling"]) == ("lors", True, 0.6)
    values = {point["scaling"]: point["value"] for point in summary["curves"]["lors"]["points"]}
    assert summary["validation"]["lors"] == min(values.values())
    assert 0 < summary["validation"]["touched_up"] < values[0.6]  # the loss after two updates, and before them
    assert version["scores"]["wer"] == summary["systems"]["touched_up"]["wer"]
    card = (touched.output / "model" / "README.md").read_text()
    assert "# Merged and touched up" in card
    assert "name: touched_up" in card
    trained = (touched.output / "training.csv").read_text()
    assert "touch up,2," in trained
    assert "lors, touched up" in (touched.output / "report.html").read_text()
    assert {"model.safetensors", "tokenizer.json"} <= {path.name for path in (touched.output / "model").iterdir()}


def test_a_touch_up_that_makes_the_model_no_better_leaves_the_merged_model_as_it_is(done: Done) -> None:
    too_far = {"steps": 1, "scaling": 9.0, "validation": {"every": 1, "start": True}}
    output = str(done.folder / "too far")
    touched = done.make(merge={"scaling": {"search": [0.3]}, "touch_up": too_far}, output=output)
    (said,) = full_pipeline(touched)["advice"]
    assert said.startswith(f"{output}: Touching up made the model no better on validation (")
    assert done.result["advice"] == []
    summary = summary_of(touched)
    assert summary["scaling"] == history(touched.output)[0]["scaling"] == 0.3
    assert summary["validation"]["touched_up"] == pytest.approx(summary["validation"]["lors"], abs=1e-5)
    own, alone = (summary["systems"][system] | {"system": None} for system in ("touched_up", "lors"))
    assert own == alone
    card = (touched.output / "model" / "README.md").read_text()
    assert "A merged model as it is: training it further on" in card


def test_the_model_with_a_language_added_is_the_one_that_is_written(done: Done) -> None:
    own = {"scaling": 0.3, "touch_up": {"steps": 2}, "added": {"languages": ["fr"], "steps": 1}}
    grown = done.make(merge=own, compare=["lors"], output=str(done.folder / "grown"))
    assert {"touch up", "add fr", "touch up fr"} <= set(full_pipeline(grown)["computed"])
    summary = summary_of(grown)
    assert list(summary["systems"])[-2:] == ["lors", "touched_up"]
    assert summary["product"] == {"system": "touched_up", "step": "touch up fr"}
    (version,) = history(grown.output)
    assert (version["model"], version["scaling"]) == (summary["digests"]["touch up fr"], 0.3)
    assert "touch up fr,1," in (grown.output / "training.csv").read_text()


def test_train_expert_gives_one_compact_expert(done: Done) -> None:
    artifact = Artifact.from_json(train_expert("fr", "translate", done.make()))
    assert artifact.stage == "prune_task_vector"
    assert artifact.digest == done.summary["digests"]["prune fr-translate"]
    assert task_states("train fr-translate", 5) == ["Cached"] * 5
    of_seeds = Artifact.from_json(train_expert("fr", "translate", done.make(seeds=[0])))
    assert of_seeds.digest == artifact.digest
    with pytest.raises(
        InputError, match="de-translate is no expert of this experiment: choose from es-transcribe, es-"
    ):
        train_expert("de", "translate", done.make())


def test_merging_wants_experts_that_are_there(done: Done) -> None:
    untrained = done.make(finetune={"steps": 9})
    with pytest.raises(InputError, match="the model of `fine-tune es-transcribe` is not in the store"):
        merge_and_evaluate(untrained)
    assert {name for name in build_steps(untrained, Store(untrained.store)) if name.startswith("fine-tune")} <= planned(
        untrained
    )
