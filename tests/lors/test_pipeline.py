"""What changes which keys: every step is finished here by files that hold its key, so that nothing is computed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from lors.config import Experiment, parse_experiment
from lors.errors import CheckpointError, ConfigError, CorpusError, InputError
from lors.outputs import touch_up_advice
from lors.pipeline import build_steps, product_step, scaling_step
from lors.starter import MODEL_FOLDER
from lors.steps import VERSIONS, Step, plan
from lors.store import Artifact, Store
from lors.training.settings import Finetune

SPLITS = ("train", "validation", "test")
FILES = {
    "fine_tune": ["model.safetensors", "config.json", "train.jsonl"],
    "extract_task_vector": ["task_vector.safetensors"],
    "prune_task_vector": ["task_vector.safetensors"],
    "combine_task_vectors": ["task_vector.safetensors"],
    "score_scaling": ["point.json"],
    "select_scaling": ["scaling.json"],
    "write_model": ["model.safetensors", "config.json", "README.md"],
    "touch_up": ["model.safetensors", "config.json", "README.md", "train.jsonl"],
    "add_task_vectors": ["model.safetensors", "config.json", "README.md"],
    "evaluate_model": ["hypotheses.parquet"],
    "score_systems": ["results.csv", "table.md"],
    "diagnose_experts": ["diagnosis.json"],
}


def finish(experiment: Experiment, store: Store) -> dict[str, str]:
    """Put every step into the store; the keys by step."""
    artifacts: dict[str, Artifact] = {}
    for name, step in build_steps(experiment, store).items():
        inputs = {role: artifacts[source.step] for role, source in step.inputs.items()}
        key, digests = step.key(inputs), step.input_digests(inputs)
        made = store.produce(step.stage, key, version=VERSIONS[step.stage], settings=step.settings, inputs=digests)
        with made as production:
            if production.hit is None:
                files = FILES.get(step.stage) or [f"{step.settings['split']}.parquet", "rejects.jsonl"]
                for file in files:
                    (production.out / file).write_text(f"{file} of {key}")
                production.publish({}, 1.0)
            assert production.artifact is not None
            artifacts[name] = production.artifact
    return {name: artifact.key for name, artifact in artifacts.items()}


def changed(before: Mapping[str, str], after: Mapping[str, str]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name, key in before.items() if after[name] != key}


def to_run(experiment: Experiment, store: Store) -> set[str]:
    return {p.step.name for p in plan(build_steps(experiment, store), store) if not p.cached}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


Make = Callable[..., Experiment]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """An experiment on manifests in `speech`, with other settings by section or dotted key."""
    speech = tmp_path / "speech"
    for language in ("es", "fr", "de"):
        for number, split in enumerate(SPLITS):
            write_manifest(speech / language / f"{split}.jsonl", language, number)

    def made(**changes: Any) -> Experiment:
        data: dict[str, Any] = {
            "base": "starter",
            "languages": ["es", "fr"],
            "corpora": {"source": "manifest", "path": f"{speech}/{{language}}/{{split}}.jsonl"},
            "compare": ["task_arithmetic"],
            "merge": {"scaling": {"search": [0.2, 0.5]}},
            "output": str(tmp_path / "out"),
            "store": str(tmp_path / "store"),
        }
        return parse_experiment(data | changes)

    return made


def write_manifest(path: Path, language: str, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for row in range(2):
        audio = path.with_name(f"{path.stem}-{row}.wav")
        write_audio(audio, seed=number * 10 + row + len(language))
        rows.append({"audio": audio.name, "text": f"{language} {path.stem} {row}", "translation": "a word"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_audio(path: Path, seed: int) -> None:
    soundfile.write(path, np.random.default_rng(seed).uniform(-0.5, 0.5, 4000), 16_000)


def merging(*methods: str) -> set[str]:
    """The steps of a method from the combination on."""
    steps = set()
    for method in methods:
        steps |= {f"score {method} at {value}" for value in (0.2, 0.5)}
        steps |= {f"{what} {method}" for what in ("combine", "select scaling", "write")}
        steps |= {f"evaluate {method} {language}" for language in ("es", "fr")}
    return steps | {"score systems"}


OF_EXPERT = ("fine-tune", "extract", "prune", "evaluate expert", "evaluate switched")


def own_steps(expert: str) -> set[str]:
    return {f"{what} {expert}" for what in OF_EXPERT}


EXPERTS = ("es-transcribe", "es-translate", "fr-transcribe", "fr-translate")
OF_ES = own_steps("es-transcribe") | own_steps("es-translate")


def test_each_step_comes_after_those_it_reads(make: Make, store: Store) -> None:
    steps = build_steps(make(), store)
    seen: set[str] = set()
    for name, step in steps.items():
        assert name == step.name
        assert {source.step for source in step.inputs.values()} <= seen
        assert step.stage in VERSIONS
        seen.add(name)
    assert {"prepare es test", "evaluate base fr", *OF_ES, *merging("lors", "task_arithmetic")} <= seen


def test_the_plan_of_an_empty_store_is_everything_and_of_a_finished_one_nothing(make: Make, store: Store) -> None:
    first = plan(build_steps(make(), store), store)
    assert not any(p.cached for p in first)
    reasons = {p.step.name: p.reason for p in first}
    assert reasons["prepare es train"] == "not made yet"
    assert reasons["fine-tune es-transcribe"] == "after prepare es train"
    finish(make(), store)
    again = plan(build_steps(make(), store), store)
    assert all(p.cached and p.seconds == 1.0 and not p.reason for p in again)


def test_another_rank_prunes_merges_and_evaluates(make: Make, store: Store) -> None:
    before = finish(make(), store)
    other = make(prune={"rank_ratio": 0.31})
    expected = {f"{what} {expert}" for expert in EXPERTS for what in ("prune", "evaluate switched")} | merging("lors")
    assert to_run(other, store) == expected
    assert changed(before, finish(other, store)) == expected


def test_a_budget_prunes_each_method_that_prunes_and_nothing_else(make: Make, store: Store) -> None:
    before = build_steps(make(compare=["sparse", "task_arithmetic"]), store)
    steps = build_steps(make(prune={"budget": "1.5kB"}, compare=["sparse", "task_arithmetic"]), store)
    pruned = {name for name, step in steps.items() if step.stage == "prune_task_vector"}
    assert pruned == {f"prune {expert}{how}" for expert in EXPERTS for how in ("", " as sparse")}
    for name, step in steps.items():
        assert step.settings == before[name].settings | ({"budget": 1500} if name in pruned else {})


def test_another_weight_or_search_keeps_the_task_vectors(make: Make, store: Store) -> None:
    finish(make(), store)
    weighted = make(merge={"scaling": {"search": [0.2, 0.5]}, "weights": {"es": 0.5}})
    assert to_run(weighted, store) == merging("lors", "task_arithmetic")
    wider = make(merge={"scaling": {"search": [0.2, 0.5, 0.2500000001]}})
    methods = ("lors", "task_arithmetic")
    known = {f"score {method} at {value}" for method in methods for value in (0.2, 0.5)}
    new = {f"score {method} at 0.2500000001" for method in methods}
    expected = merging(*methods) - known - {f"combine {method}" for method in methods} | new
    assert to_run(wider, store) == expected


@pytest.mark.parametrize("change", ["audio in place", "text", "row added"])
def test_one_language_s_training_speech(change: str, make: Make, store: Store, tmp_path: Path) -> None:
    before = finish(make(), store)
    manifest = tmp_path / "speech" / "es" / "train.jsonl"
    if change == "audio in place":  # as long as it was, and with its old time
        audio = manifest.with_name("train-0.wav")
        status, size = audio.stat(), audio.stat().st_size
        write_audio(audio, seed=99)
        os.utime(audio, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert audio.stat().st_size == size
    elif change == "text":
        manifest.write_text(manifest.read_text().replace("es train 0", "es train x"))
    else:
        manifest.write_text(manifest.read_text() + manifest.read_text().splitlines()[0] + "\n")
    expected = {"prepare es train", "diagnose experts"} | OF_ES | merging("lors", "task_arithmetic")
    assert to_run(make(), store) == expected
    assert changed(before, finish(make(), store)) == expected


def test_new_test_speech_trains_nothing_and_merges_nothing(make: Make, store: Store, tmp_path: Path) -> None:
    before = finish(make(), store)
    write_audio(tmp_path / "speech" / "es" / "test-0.wav", seed=99)
    expected = {"prepare es test", "score systems"} | {
        f"evaluate {what}" for what in ("base es", "lors es", "task_arithmetic es")
    }
    expected |= {f"evaluate {who} es-{task}" for who in ("expert", "switched") for task in ("transcribe", "translate")}
    assert to_run(make(), store) == expected
    assert changed(before, finish(make(), store)) == expected


def test_a_manifest_rewritten_in_another_form_changes_nothing(make: Make, store: Store, tmp_path: Path) -> None:
    before = finish(make(), store)
    manifest = tmp_path / "speech" / "es" / "train.jsonl"
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    manifest.write_text("".join(json.dumps(dict(reversed(row.items())), indent=None) + "\n" for row in rows))
    assert changed(before, finish(make(), store)) == set()


def test_a_language_more_costs_its_own_work_and_the_merge(make: Make, store: Store) -> None:
    finish(make(languages=["es"]), store)
    expected = {f"prepare fr {split}" for split in SPLITS} | {"evaluate base fr", "diagnose experts"}
    expected |= own_steps("fr-transcribe") | own_steps("fr-translate") | merging("lors", "task_arithmetic")
    assert to_run(make(), store) == expected


def test_the_tasks_of_a_language_together_are_one_training_and_one_task_vector(make: Make, store: Store) -> None:
    finetune = {"steps": 10, "tasks": "together"}
    steps, keys = build_steps(make(finetune=finetune), store), finish(make(finetune=finetune), store)
    trained = steps["fine-tune es-transcribe"].settings
    assert trained["parts"] == [["es", "transcribe"], ["es", "translate"]]
    assert trained["finetune"]["steps"] == 20
    for what in ("fine-tune", "extract", "prune"):
        assert keys[f"{what} es-transcribe"] == keys[f"{what} es-translate"] != keys[f"{what} fr-transcribe"]
    assert keys["evaluate expert es-transcribe"] != keys["evaluate expert es-translate"]
    for name in ("combine lors", "combine task_arithmetic", "diagnose experts"):
        assert set(steps[name].inputs) == {"es-transcribe", "fr-transcribe"}
    alone = finish(make(finetune={"steps": 10}), store)
    assert keys["fine-tune es-transcribe"] != alone["fine-tune es-transcribe"]


def test_experts_that_are_trained_together_are_searched_as_one(make: Make, store: Store) -> None:
    scaling = {"search": [0.5], "per": "expert", "factors": [2.0]}
    steps = build_steps(make(finetune={"tasks": "together"}, merge={"scaling": scaling}), store)
    searched = {step.settings.get("coordinate") for step in steps.values() if step.stage == "score_scaling"}
    assert searched == {None, "es-transcribe", "fr-transcribe"}


def test_only_experts_are_held_to_the_base(make: Make, store: Store) -> None:
    held, baselines = {"preserve": {"weight": 2.0}}, {"baselines": ["multitask", "sequential"]}
    before = finish(make(**baselines), store)
    again = to_run(make(finetune=held, **baselines), store)
    assert {name for name in again if name.startswith("fine-tune")} == {f"fine-tune {expert}" for expert in EXPERTS}
    assert not any("preserve" in step.settings["finetune"] for step in build_steps(make(), store).values()
                   if step.stage == "fine_tune")  # fmt: skip
    assert changed(before, finish(make(finetune=held, **baselines), store)) >= {f"prune {e}" for e in EXPERTS}
    more = to_run(make(finetune=held, languages=["es", "fr", "de"], **baselines), store)
    own = {f"fine-tune {name}" for name in ("de-transcribe", "de-translate", "sequential de", "multitask")}
    assert {name for name in more if name.startswith("fine-tune")} == own


HELD = {"preserve": {"speech": ["es", "fr", "de"], "utterances": 1}, "tasks": "together"}


def test_experts_are_held_on_the_first_utterances_of_other_languages(make: Make, store: Store) -> None:
    steps = build_steps(make(finetune=HELD, baselines=["multitask", "multitask_held"]), store)
    held = {
        name: {role.removeprefix("held-"): source for role, source in step.inputs.items() if role.startswith("held-")}
        for name, step in steps.items()
        if step.stage == "fine_tune"
    }
    assert {name: set(found) for name, found in held.items()} == {
        "fine-tune es-transcribe": {"fr", "de"},
        "fine-tune es-translate": {"fr", "de"},
        "fine-tune fr-transcribe": {"es", "de"},
        "fine-tune fr-translate": {"es", "de"},
        "fine-tune multitask": set(),
        "fine-tune multitask_held": {"de"},
    }
    assert {source.step for found in held.values() for source in found.values()} == {
        f"prepare {language} held" for language in ("es", "fr", "de")
    }
    assert steps["prepare de held"].settings["limit"] == 1
    trained = {name: steps[f"fine-tune {name}"].settings for name in ("es-transcribe", "multitask", "multitask_held")}
    hold = {name: settings["finetune"].get("preserve") for name, settings in trained.items()}
    assert hold["multitask_held"] == hold["es-transcribe"] is not None
    assert hold["multitask"] is None
    assert trained["multitask_held"]["parts"] == trained["multitask"]["parts"]
    assert trained["multitask_held"]["finetune"]["steps"] == trained["multitask"]["finetune"]["steps"]
    assert steps["prepare es train"].settings["limit"] is None


def test_more_speech_of_a_language_leaves_the_experts_that_are_held_on_its_first(
    make: Make, store: Store, tmp_path: Path
) -> None:
    finish(make(finetune=HELD), store)
    manifest = tmp_path / "speech" / "es" / "train.jsonl"
    write_audio(manifest.with_name("train-new.wav"), seed=99)
    row = {"audio": "train-new.wav", "text": "nuevo", "translation": "new"}
    manifest.write_text(manifest.read_text() + json.dumps(row) + "\n")
    again = to_run(make(finetune=HELD), store)
    assert {n for n in again if n.startswith("fine-tune")} == {"fine-tune es-transcribe", "fine-tune es-translate"}


def test_a_language_more_leaves_the_experts_that_were_held_on_it(make: Make, store: Store) -> None:
    finish(make(finetune=HELD), store)
    again = to_run(make(finetune=HELD, languages=["es", "fr", "de"]), store)
    assert {n for n in again if n.startswith("fine-tune")} == {"fine-tune de-transcribe", "fine-tune de-translate"}


TOUCH_UP = {"scaling": {"search": [0.2, 0.5]}, "touch_up": {"steps": 7}}


def test_the_merged_model_is_touched_up_on_all_languages_and_tasks(make: Make, store: Store) -> None:
    finish(make(), store)
    touched = make(merge=TOUCH_UP)
    assert (make().product, touched.product) == ("lors", "touched_up")
    own = {"touch up", *evaluated("touched_up", "es", "fr"), "score systems"}
    assert to_run(touched, store) == own
    step = build_steps(touched, store)["touch up"]
    assert step.inputs["start"].step == "write lors"
    assert step.settings["finetune"] | {"steps": None} == Finetune(steps=7).identity() | {"steps": None}
    assert step.settings["parts"] == [[e.language, e.task] for e in touched.experts]
    finish(touched, store)
    slower = TOUCH_UP | {"touch_up": {"steps": 7, "learning_rate": 1e-5}}
    assert to_run(make(merge=slower), store) == own
    assert "touch up" in to_run(make(merge=TOUCH_UP, prune={"rank_ratio": 0.3}), store)


def test_a_touch_up_that_makes_a_model_no_better_is_said(make: Make) -> None:
    def said(touched: dict[str, Any], **own: Any) -> str | None:
        return touch_up_advice(make(merge={"touch_up": {"steps": 2} | own}), touched)

    kept = "Touching up made the model no better on validation (2.11 without), so the merged model is kept as it is: "
    change = "give merge.touch_up more steps or a lower learning_rate, or leave it out."
    start = {"best_step": 0, "best_value": 2.11}
    assert said(start) == f"{kept}{change}"
    assert said(start, scaling=2.0) == f"{kept}lower merge.touch_up.scaling, or {change}"
    assert said(start | {"best_step": 1}) is None
    assert said({}) is None  # nothing was validated
    assert touch_up_advice(make(), {}) is None


def test_the_touch_up_may_start_from_a_merge_at_its_own_scaling(make: Make, store: Store) -> None:
    finish(make(), store)
    own = TOUCH_UP | {"touch_up": {"steps": 7, "scaling": 1.5}}
    larger = make(merge=own)
    new = {"select scaling lors to touch up", "write lors to touch up", "touch up"}
    assert to_run(larger, store) == {*new, *evaluated("touched_up", "es", "fr"), "score systems"}
    steps = build_steps(larger, store)
    assert steps["touch up"].inputs["start"].step == "write lors to touch up"
    assert scaling_step(larger) == "select scaling lors to touch up"
    assert steps[scaling_step(larger)].settings["scaling"] == 1.5
    assert steps["evaluate lors es"].inputs["model"].step == "write lors"
    started = {source.step for source in steps["write lors to touch up"].inputs.values()}
    assert started == {"combine lors", scaling_step(larger)}
    finish(larger, store)

    # The merge that a language is added to is the same one, and needs no search of its own.
    more = own | {"added": {"languages": ["de"], "steps": 3}}
    added = make(merge=more, languages=["es", "fr", "de"], compare=[])
    assert not {"touch up", "write lors first to touch up", "combine lors first"} & to_run(added, store)
    steps = build_steps(added, store)
    assert scaling_step(added) == "select scaling lors first to touch up"
    assert steps[scaling_step(added)].settings["scaling"] == 1.5
    assert not [name for name in steps if name.startswith("score lors")]


def test_a_touch_up_from_its_own_scaling_may_keep_the_merge_at_the_searched_one(make: Make, store: Store) -> None:
    own = {"steps": 7, "scaling": 1.5, "validation": {"every": 7, "start": True}}
    guarded = make(merge=TOUCH_UP | {"touch_up": own})
    inputs = build_steps(guarded, store)["touch up"].inputs
    assert (inputs["start"].step, inputs["merged"].step) == ("write lors to touch up", "write lors")
    assert scaling_step(guarded, kept=True) == "select scaling lors"
    for other in ({"scaling": None}, {"validation": {"every": 7}}, {"validation": None}):
        steps = build_steps(make(merge=TOUCH_UP | {"touch_up": own | other}), store)
        assert "merged" not in steps["touch up"].inputs
    finish(guarded, store)
    more = TOUCH_UP | {"touch_up": own, "added": {"languages": ["de"], "steps": 3}}
    later = make(merge=more, languages=["es", "fr", "de"], compare=[])
    assert build_steps(later, store)["touch up"].inputs["merged"].step == "write lors first"
    assert not {"touch up", "write lors first"} & to_run(later, store)


def test_the_touched_up_model_may_be_held_on_other_speech_than_the_experts(make: Make, store: Store) -> None:
    own = TOUCH_UP | {"touch_up": {"steps": 7, "speech": ["de"]}}
    held = {"preserve": {"speech": ["es"], "utterances": 1}}
    guarded = make(finetune=held, merge=own)
    assert guarded.held == ("es", "de")
    steps = build_steps(guarded, store)
    assert steps["touch up"].inputs["held-de"].step == "prepare de held"
    assert steps["touch up"].settings["finetune"]["preserve"]["speech"] == ["de"]
    assert {n for n, step in steps.items() if "held-es" in step.inputs} == {
        "fine-tune fr-transcribe",
        "fine-tune fr-translate",
    }


def test_a_language_is_added_to_the_finished_model(make: Make, store: Store) -> None:
    finish(make(merge=TOUCH_UP, languages=["es"], compare=[]), store)

    def adding(*languages: str, **changes: Any) -> Experiment:
        added = {"languages": languages, "steps": 3, "scaling": 0.8, "learning_rate": 1e-5} | changes
        return make(merge=TOUCH_UP | {"added": added}, languages=["es", *languages], compare=[])

    one = adding("fr")
    expected = {f"{step} fr-{task}" for step in ("fine-tune", "extract", "prune") for task in one.tasks}
    expected |= {f"evaluate {of} fr-{task}" for of in ("expert", "switched") for task in one.tasks}
    expected |= {f"prepare fr {split}" for split in SPLITS} | evaluated("base", "fr") | {"diagnose experts"}
    expected |= {"add fr", "touch up fr", *evaluated("touched_up", "es", "fr"), "score systems"}
    assert to_run(one, store) == expected
    steps = build_steps(one, store)
    assert (product_step(one), scaling_step(one)) == ("touch up fr", "select scaling lors first")
    assert {n: source.step for n, source in steps["add fr"].inputs.items()} == {
        "start": "touch up",
        "vector-fr-transcribe": "prune fr-transcribe",
        "vector-fr-translate": "prune fr-translate",
    }
    assert steps["add fr"].settings["scaling"] == 0.8
    later, first = steps["touch up fr"].settings, steps["touch up"].settings
    assert (later["finetune"]["steps"], later["finetune"]["learning_rate"]) == (3, 1e-5)
    assert later["parts"] == [[e.language, e.task] for e in one.experts]
    assert first["parts"] == later["parts"][:2]
    finish(one, store)

    again = to_run(adding("fr", "de"), store)
    assert not {"touch up", "touch up fr"} & again
    assert {"add de", "touch up de"} <= again
    untouched = adding("fr", steps=0)
    steps = build_steps(untouched, store)
    assert "touch up fr" not in steps
    assert steps["evaluate touched_up es"].inputs["model"].step == product_step(untouched) == "add fr"


def test_the_merge_of_all_languages_can_be_compared_with_what_was_added(make: Make, store: Store) -> None:
    own = TOUCH_UP | {"added": {"languages": ["de"]}}
    both = make(merge=own, languages=["es", "fr", "de"], compare=["lors"])
    steps = build_steps(both, store)
    assert {e.language for e in both.first} == {"es", "fr"}
    assert set(steps["combine lors first"].inputs) == {e.id for e in both.experts if e.language != "de"}
    assert set(steps["combine lors"].inputs) == {e.id for e in both.experts}
    assert steps["score lors first at 0.2"].settings["languages"] == ["es", "fr"]
    assert steps["touch up"].inputs["start"].step == "write lors first"
    assert steps["evaluate lors de"].inputs["model"].step == "write lors"
    assert scaling_step(both) == "select scaling lors first"


def evaluated(system: str, *languages: str) -> set[str]:
    return {f"evaluate {system} {language}" for language in languages}


SEQUENTIAL = {f"fine-tune sequential {language}" for language in ("es", "fr")}


def test_baselines_share_everything_with_the_rest(make: Make, store: Store) -> None:
    before = finish(make(), store)
    both = make(baselines=["switched", "multitask", "sequential"])
    expected = {"fine-tune multitask", "score systems", *SEQUENTIAL}
    expected |= evaluated("multitask", "es", "fr") | evaluated("sequential", "es", "fr")
    assert to_run(both, store) == expected
    after = finish(both, store)
    assert {name for name, key in before.items() if after[name] != key} == {"score systems"}
    assert to_run(make(baselines=["experts", "base"]), store) == {"score systems"}


def test_baselines_take_as_many_updates_as_all_experts_together(make: Make, store: Store) -> None:
    finetune = {"steps": 10, "max_hours": 0.5}
    steps = build_steps(make(baselines=["multitask", "sequential"], finetune=finetune), store)
    updates = {name: step.settings["finetune"]["steps"] for name, step in steps.items() if step.stage == "fine_tune"}
    hours = {name: step.settings["finetune"]["max_hours"] for name, step in steps.items() if step.stage == "fine_tune"}
    assert updates == {f"fine-tune {expert}": 10 for expert in EXPERTS} | dict.fromkeys(SEQUENTIAL, 20) | {
        "fine-tune multitask": 40
    }
    assert hours == {name: count / 20 for name, count in updates.items()}
    parts = [[language, task] for language in ("es", "fr") for task in ("transcribe", "translate")]
    assert steps["fine-tune multitask"].settings["parts"] == parts
    assert steps["fine-tune sequential fr"].settings["parts"] == parts[2:]
    assert steps["fine-tune sequential fr"].inputs["start"].step == "fine-tune sequential es"


def test_the_sequential_baseline_goes_on_from_where_it_was(make: Make, store: Store) -> None:
    finish(make(baselines=["multitask", "sequential"]), store)
    more = to_run(make(baselines=["multitask", "sequential"], languages=["es", "fr", "de"]), store)
    trained = {"de-transcribe", "de-translate", "sequential de", "multitask"}
    assert {step for step in more if step.startswith("fine-tune")} == {f"fine-tune {name}" for name in trained}
    turned = to_run(make(baselines=["multitask", "sequential"], sequence=["fr", "es"]), store)
    assert turned == {*SEQUENTIAL, *evaluated("sequential", "es", "fr"), "score systems"}


def test_a_guard_language_is_evaluated_and_trained_nowhere(make: Make, store: Store) -> None:
    finish(make(baselines=["multitask"]), store)
    guarded = make(baselines=["multitask"], evaluate={"guard": ["de"]})
    expected = {"prepare de test", "score systems"}
    for system in ("base", "multitask", "lors", "task_arithmetic"):
        expected |= evaluated(system, "de")
    assert to_run(guarded, store) == expected


def test_validation_in_training_depends_on_decoding_only_where_it_decodes(make: Make, store: Store) -> None:
    def experiment(metric: str, beams: int) -> Experiment:
        finetune = {"validation": {"every": 5, "metric": metric}}
        return make(tasks=["transcribe"], finetune=finetune, evaluate={"beams": beams})

    for metric in ("loss", "score"):
        finish(experiment(metric, 1), store)
        trained = {step for step in to_run(experiment(metric, 2), store) if step.startswith("fine-tune")}
        assert bool(trained) == (metric == "score")


def test_all_that_decodes_falls_back_or_nothing_does(make: Make, store: Store) -> None:
    def decoding(**evaluate: Any) -> dict[str, Any]:
        finetune = {"validation": {"every": 5, "metric": "score"}}
        steps = build_steps(make(finetune=finetune, evaluate=evaluate), store)
        decoders = {name: step.settings for name, step in steps.items() if "beams" in step.settings}
        trained = {name: step.settings["evaluate"] for name, step in steps.items() if "evaluate" in step.settings}
        return decoders | trained

    plain, falling = decoding(), decoding(fallback=True)
    assert {name.partition(" ")[0] for name in plain} == {"evaluate", "score", "fine-tune"}
    assert falling == {name: settings | {"fallback": True} for name, settings in plain.items()}
    assert not any("fallback" in settings for settings in plain.values())


def test_resources_and_places_are_in_no_key(make: Make, store: Store, tmp_path: Path) -> None:
    before = finish(make(), store)
    own = {"parallel": 7, "threads": 3, "processes": 2, "tensorboard": str(tmp_path / "curves")}
    elsewhere = make(resources=own, output=str(tmp_path / "elsewhere"))
    assert changed(before, finish(elsewhere, store)) == set()
    moved = Store(shutil.move(store.root, tmp_path / "moved-store"))
    shutil.copytree(MODEL_FOLDER, tmp_path / "base")
    shutil.move(tmp_path / "speech", tmp_path / "spoken")
    path = f"{tmp_path}/spoken/{{language}}/{{split}}.jsonl"
    changes = {"base": str(tmp_path / "base"), "corpora": {"source": "manifest", "path": path}}
    assert to_run(make(store=str(moved.root), **changes), moved) == set()


@pytest.mark.parametrize("file", ["tokenizer.json", "generation_config.json", "model.safetensors"])
def test_another_base_trains_again(file: str, make: Make, store: Store, tmp_path: Path) -> None:
    base = shutil.copytree(MODEL_FOLDER, tmp_path / "base")
    before = finish(make(base=str(base)), store)
    with (base / file).open("ab") as content:
        content.write(b" ")
    after = changed(before, finish(make(base=str(base)), store))
    assert after == {name for name in before if not name.startswith("prepare")}


def test_the_card_of_a_base_is_in_no_key(make: Make, store: Store, tmp_path: Path) -> None:
    base = shutil.copytree(MODEL_FOLDER, tmp_path / "base")
    before = finish(make(base=str(base)), store)
    (base / "README.md").write_text("another card")
    (base / "starter.json").unlink(missing_ok=True)
    assert changed(before, finish(make(base=str(base)), store)) == set()


def test_synthetic_counts_are_those_of_their_own_split(make: Make, store: Store) -> None:
    def spoken(**counts: int) -> Experiment:
        return make(corpora={"source": "synthetic", "overrides": {"es": counts}})

    before = finish(spoken(test=7), store)
    assert changed(before, finish(spoken(test=7, validation=5), store)) == (
        {"prepare es validation", "diagnose experts"} | OF_ES | merging("lors", "task_arithmetic")
    )
    assert to_run(make(corpora={"source": "synthetic", "seed": 5}), store) >= {
        f"prepare {language} {split}" for language in ("es", "fr") for split in SPLITS
    }


def entry_of(step: str, keys: Mapping[str, str], store: Store, steps: Mapping[str, Step]) -> Path:
    return store.root / "entries" / steps[step].stage / keys[step] / "files"


def test_a_damaged_entry_is_planned_with_its_file_named(make: Make, store: Store) -> None:
    keys = finish(make(), store)
    assert to_run(make(), store) == set()  # the memo has every digest now
    vector = entry_of("prune es-translate", keys, store, build_steps(make(), store)) / "task_vector.safetensors"
    status = vector.stat()
    content = bytearray(vector.read_bytes())
    content[5] ^= 1
    vector.write_bytes(content)
    os.utime(vector, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert store.find("prune_task_vector", keys["prune es-translate"]) is None
    reasons = {p.step.name: p.reason for p in plan(build_steps(make(), Store(store.root)), Store(store.root))}
    assert "task_vector.safetensors" in reasons["prune es-translate"]
    assert reasons["combine lors"] == "after prune es-translate"
    assert {name for name, reason in reasons.items() if reason} == (
        {"prune es-translate", "evaluate switched es-translate"} | merging("lors")
    )


def test_a_deleted_file_is_planned(make: Make, store: Store) -> None:
    keys = finish(make(), store)
    (entry_of("score systems", keys, store, build_steps(make(), store)) / "results.csv").unlink()
    assert to_run(make(), store) == {"score systems"}


def base_of(folder: Path, **config: Any) -> str:
    shutil.copytree(MODEL_FOLDER, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return str(folder)


def test_what_is_wrong_with_a_base_is_said(make: Make, store: Store, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere is not a folder; give a model folder"):
        build_steps(make(base=str(tmp_path / "nowhere")), store)
    with pytest.raises(CheckpointError, match="is of type 'wav2vec2': LoRS works on Whisper models"):
        build_steps(make(base=base_of(tmp_path / "other", model_type="wav2vec2")), store)
    pickled = Path(base_of(tmp_path / "pickled"))
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickled weights only"):
        build_steps(make(base=str(pickled)), store)
    english = Path(base_of(tmp_path / "english"))
    (english / "generation_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is not multilingual"):
        build_steps(make(base=str(english)), store)
    few = Path(base_of(tmp_path / "few"))
    (few / "generation_config.json").write_text(json.dumps({"lang_to_id": {"<|es|>": 1, "<|de|>": 2}}))
    with pytest.raises(ConfigError, match=r"no token for 'fr'.*it has de, es\)"):
        build_steps(make(base=str(few)), store)


def test_patterns_of_pruning_that_name_no_parameter_are_refused(make: Make, store: Store) -> None:
    for prune, message in (
        ({"groups": {"encodr": {"density": 0.2}}}, r"prune\.groups: .* 'encodr', did you mean 'encoder'\?: name a "),
        ({"include": ["*.fc1.weight", "*.fc9.weight"]}, r"prune\.include: .* base starter belongs to '\*\.fc9\.w"),
        ({"exclude": ["conv"]}, r"prune\.exclude: .* 'conv'"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_steps(make(prune=prune), store)
    known = {"include": ["*"], "exclude": ["embeddings"], "groups": {"*.decoder.layers.0.fc1.weight": {"density": 0.2}}}
    assert "prune es-translate" in build_steps(make(prune=known), store)


def test_what_is_wrong_with_a_corpus_is_said(make: Make, store: Store, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the synthetic corpus does not speak 'ja', choose from ca, de"):
        build_steps(make(languages=["es", "ja"], corpora={"source": "synthetic"}), store)
    (tmp_path / "speech" / "fr" / "validation.jsonl").unlink()
    with pytest.raises(CorpusError, match=r"fr/validation\.jsonl"):
        build_steps(make(), store)
    assert issubclass(CorpusError, InputError)


def test_a_method_s_parameters_are_its_own(make: Make, store: Store) -> None:
    compare = ["ties", "sparse"]
    finish(make(compare=compare), store)
    merge = {"scaling": {"search": [0.2, 0.5]}, "parameters": {"ties": {"density": 0.3}}}
    assert to_run(make(compare=compare, merge=merge), store) == merging("ties")
    grouped = {"scaling": {"search": [0.2, 0.5]}, "groups": {"encoder": {"scaling": 0.1}}}
    assert to_run(make(compare=compare, merge=grouped), store) == merging("lors", "ties", "sparse")
    ranked = {"scaling": {"search": [0.2, 0.5]}, "groups": {"encoder": {"rank_ratio": 0.3}}}
    assert {f"prune {expert}" for expert in EXPERTS} < to_run(make(compare=compare, merge=ranked), store)
    pruned = {f"prune {expert}{suffix}" for expert in EXPERTS for suffix in ("", " as sparse")}
    pruned |= {f"evaluate switched {expert}" for expert in EXPERTS}
    assert to_run(make(compare=compare, prune={"density": 0.3}), store) == pruned | merging("lors", "sparse")
    settings = build_steps(make(compare=compare), store)["prune es-translate as sparse"].settings
    assert settings["composition"] == "sparse"
