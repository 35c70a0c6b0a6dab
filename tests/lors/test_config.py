"""The experiment file: what is accepted, what is refused, and in which words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pydantic
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lors.config import load_experiment, parse_experiment
from lors.errors import ConfigError
from lors.merging.settings import ScalingSearch
from lors.speech.corpora.settings import DatasetsCorpora, Hours, Limits, ManifestCorpora, SyntheticCorpora

DEPLOYMENTS = Path(__file__).parents[2] / "deployments"
MANIFEST = {"source": "manifest", "path": "data/{language}/{split}.jsonl"}


def experiment(**changes: Any) -> dict[str, Any]:
    data = {"base": "starter", "languages": ["es", "fr"], "corpora": {"source": "synthetic"}, "output": "out"}
    return data | changes


def refusal(**changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_experiment(experiment(**changes))
    message = str(caught.value)
    assert message.startswith("the experiment: ")
    assert "\n" not in message
    return message.removeprefix("the experiment: ")


def write(folder: Path, data: Any) -> Path:
    path = folder / "experiment.yaml"
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data))
    return path


# Files of Prefect and Docker, which tests/flows/test_deployments.py reads.
OTHERS = {"automations", "compose", "kubernetes", "prefect"}


@pytest.mark.parametrize(
    "path", sorted(p for p in DEPLOYMENTS.glob("*.yaml") if p.stem not in OTHERS), ids=lambda path: path.stem
)
def test_shipped_experiments_load(path: Path) -> None:
    loaded = load_experiment(path)
    assert len(loaded.experts) == len(loaded.languages) * len(loaded.tasks)


def test_demo_is_shipped() -> None:
    demo = load_experiment(DEPLOYMENTS / "demo.yaml")
    assert demo.base == "starter"
    assert demo.systems == ("lors", "task_arithmetic", "weight_average")
    assert len(demo.experts) >= 6


@pytest.mark.parametrize(
    ("changes", "key", "nearest"),
    [
        ({"lanuages": ["es"]}, "lanuages", "languages"),
        ({"finetune": {"learning_rat": 1}}, "finetune.learning_rat", "learning_rate"),
        ({"prune": {"rank_ration": 0.1}}, "prune.rank_ration", "rank_ratio"),
        ({"evaluate": {"beam": 2}}, "evaluate.beam", "beams"),
        ({"resources": {"thread": 2}}, "resources.thread", "threads"),
        ({"merge": {"methode": "lors"}}, "merge.methode", "method"),
        ({"merge": {"scaling": {"serch": [0.1]}}}, "merge.scaling.serch", "search"),
        ({"corpora": {"source": "synthetic", "utterance": {}}}, "corpora.utterance", "utterances"),
        ({"corpora": {"source": "synthetic", "utterances": {"tran": 3}}}, "corpora.utterances.tran", "train"),
        ({"corpora": {"source": "synthetic", "overrides": {"es": {"tset": 3}}}}, "corpora.overrides.es.tset", "test"),
        ({"corpora": {**MANIFEST, "colums": {}}}, "corpora.colums", "columns"),
        ({"corpora": {**MANIFEST, "limits": {"vaildation": 1}}}, "corpora.limits.vaildation", "validation"),
        ({"corpora": {**MANIFEST, "overrides": {"es": {"pth": "x"}}}}, "corpora.overrides.es.pth", "path"),
        ({"finetune": {"validation": {"evry": 5}}}, "finetune.validation.evry", "every"),
        ({"finetune": {"lora": {"rnk": 5}}}, "finetune.lora.rnk", "rank"),
        (
            {"finetune": {"augment": {"spec_augment": {"time_mask": 5}}}},
            "finetune.augment.spec_augment.time_mask",
            "time_masks",
        ),
        ({"corpora": {"source": "folder", "path": "x", "share": {}}}, "corpora.share", "shares"),
        ({"corpora": {"source": "datasets", "preset": "mls", "stream": True}}, "corpora.stream", "streaming"),
        ({"corpora": {"source": "common_voice", "path": "x", "local": "a"}}, "corpora.local", "locale"),
        ({"corpora_of": {"es": {**MANIFEST, "pth": "x"}}}, "corpora_of.es.pth", "path"),
        (
            {"corpora": {**MANIFEST, "overrides": {"es": {"limits": {"trian": 1}}}}},
            "corpora.overrides.es.limits.trian",
            "train",
        ),
    ],
)
def test_unknown_key_is_named_with_the_nearest(changes: dict[str, Any], key: str, nearest: str) -> None:
    message = refusal(**changes)
    assert message.startswith(f"unknown key {key!r}, did you mean {nearest!r}?")
    assert nearest in message.partition("known here: ")[2]


def test_unknown_key_goes_before_its_consequences() -> None:
    data = experiment(lanuages=["es"])
    del data["languages"]
    with pytest.raises(ConfigError, match="unknown key 'lanuages', did you mean 'languages'"):
        parse_experiment(data)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prune": {"rank_ratio": 0}}, "prune.rank_ratio should be greater than 0, not 0"),
        ({"prune": {"density": 1.5}}, "prune.density should be less than or equal to 1, not 1.5"),
        ({"evaluate": {"window": float("nan")}}, "evaluate.window should be 'auto' or a finite number, not nan"),
        ({"finetune": {"learning_rate": float("inf")}}, "finetune.learning_rate should be a finite number, not inf"),
        ({"prune": {"budget": "20 potatoes"}}, "prune.budget: the size '20 potatoes' is not a number and a unit"),
        ({"prune": {"composition": "sparse", "refinements": 1}}, "prune: refinements need the composition additive"),
        ({"languages": ["es", "fr", "es"]}, "languages: es is listed twice"),
        ({"compare": ["lors", "lors"]}, "compare: lors is listed twice"),
        ({"languages": []}, "languages is empty: list at least one value"),
        ({"languages": ["Spanish"]}, "languages.0 should be a language code of two or three small letters"),
        ({"languages": [False]}, "languages.0 should be a valid string, not False (YAML reads a bare no, off, yes"),
        ({"tasks": "transcribe"}, "tasks should be a list, not 'transcribe'"),
        ({"tasks": ["transcribe", "sing"]}, "tasks.1 should be 'transcribe' or 'translate', not 'sing'"),
        ({"finetune": 5}, "finetune should be a mapping, not 5"),
        ({"finetune": {"window": -1}}, "finetune.window should be 'auto' or greater than 0, not -1"),
        ({"merge": {"scaling": -1}}, "merge.scaling should be greater than or equal to 0 or a mapping, not -1"),
        ({"merge": {"scaling": {"search": [-1]}}}, "merge.scaling.search.0 should be greater than or equal to 0"),
        ({"merge": {"scaling": {"search": []}}}, "merge.scaling.search is empty"),
        ({"merge": {"method": "lor"}}, "merge.method: 'lor' is not a merging method, did you mean 'lors'?"),
        ({"compare": ["task_arithmetics"]}, "compare: 'task_arithmetics' is not a merging method, did you mean 'task_"),
        (
            {"merge": {"weights": {"es-transcrib": 1}}},
            "merge.weights names 'es-transcrib', which is no expert, did ",
        ),
        ({"merge": {"weights": {"de": 1}}}, "merge.weights names 'de', which is no expert"),
        (
            {"merge": {"weights": {"es-translate": 2}}, "finetune": {"tasks": "together"}},
            "merge.weights: 'es-translate' has no effect, as the tasks of a language are one training "
            "(finetune.tasks: together): name 'es'",
        ),
        (
            {"merge": {"weights": {"es": 2, "es-transcribe": 1, "es-translate": 1}}},
            "merge.weights: 'es' has no effect, as its experts have their own: leave it out",
        ),
        (
            {"merge": {"touch_up": {"steps": 1}, "added": {"languages": ["de"]}}},
            "merge.added.languages names 'de', which must be among the languages once",
        ),
        (
            {"merge": {"added": {"languages": ["es"]}}},
            "merge.added.languages are added to a model that is touched up: set ",
        ),
        (
            {"merge": {"touch_up": {"steps": 1}, "added": {"languages": ["es", "fr"]}}},
            "merge.added.languages names all languages: leave out those to start with",
        ),
        (
            {"merge": {"touch_up": {"steps": 1, "speech": ["it"]}}},
            "merge.touch_up.speech is what a model is held to the base on: set finetune.preserve too",
        ),
        ({"merge": {"parameters": {"ties": {"densty": 1}}}}, "merge: parameters: ties has no parameter 'densty'"),
        ({"merge": {"parameters": {"tise": {}}}}, "merge: 'tise' is not a merging method, did you mean"),
        ({"merge": {"groups": {"encoder": {"scalng": 1}}}}, "unknown key 'merge.groups.encoder.scalng', did you mean"),
        ({"corpora": {}}, "corpora.source is missing: say manifest, folder, common_voice,"),
        (
            {"corpora": {"source": "cloud"}},
            "corpora.source must be manifest, folder, common_voice, datasets or synthetic, not 'cloud'",
        ),
        ({"corpora": None}, "corpora should be a mapping, not None"),
        ({"corpora": {"source": "manifest"}}, "'corpora.path' is missing: add it"),
        (
            {"corpora": {**MANIFEST, "columns": {"txt": "a"}}},
            "corpora.columns: 'txt' is no column of ours, did you ",
        ),
        (
            {"corpora": {**MANIFEST, "overrides": {"es": {"columns": {"txt": "a"}}}}},
            "corpora.overrides.es.columns: 'txt' is no column of ours, did you mean 'text'",
        ),
        ({"corpora": {**MANIFEST, "overrides": {"de": {}}}}, "corpora.overrides names 'de', which is not among the"),
        ({"corpora": {**MANIFEST, "path": "{language}.csv"}}, "corpora.path '{language}.csv' of es has no {split}"),
        ({"corpora": {**MANIFEST, "path": "{split}.csv"}}, "corpora.path gives fr the files of es"),
        ({"corpora": {"source": "folder", "path": "all"}}, "corpora.path gives fr the files of es"),
        ({"corpora": {"source": "datasets", "path": "a/b"}}, "corpora.path gives fr the files of es"),
        (
            {"corpora": {"source": "datasets", "path": "a/b", "name": "es", "overrides": {"es": {"limits": {}}}}},
            "corpora.path gives fr the files of es: put {language} in it or in corpora.name, or override it",
        ),
        (
            {"corpora": {"source": "folder", "path": "{language}/{split}"}},
            "corpora.path '{language}/{split}' names all",
        ),
        ({"corpora": {"source": "datasets"}}, "corpora: give a path (a hub id or a folder) or a preset (fleurs, cov"),
        ({"corpora": {"source": "datasets", "preset": "common_voice"}}, "corpora.preset: Common Voice left the hub"),
        (
            {"corpora": {"source": "datasets", "path": "x", "splits": {"dev": "a"}}},
            "corpora.splits: 'dev' is no split of ours",
        ),
        ({"corpora_of": {"de": MANIFEST}}, "corpora_of names 'de', which is not among the languages"),
        ({"corpora_of": {"fr": {**MANIFEST, "path": "x.csv"}}}, "corpora_of.fr.path 'x.csv' of fr has no {split}"),
        ({"corpora_of": {"fr": {**MANIFEST, "overrides": {"fr": {}}}}}, "corpora_of.fr is of one language: put its"),
        ({"evaluate": {"guard": ["es"]}}, "evaluate.guard names 'es', which experts are trained for"),
        (
            {"baselines": ["multitusk"]},
            "baselines.0 should be 'base', 'experts', 'switched', 'multitask', 'multitask_held' or 'sequential'",
        ),
        (
            {"baselines": ["multitask_held"]},
            "baselines: multitask_held is held to the base by finetune.preserve: set that too",
        ),
        ({"baselines": ["multitask", "multitask"]}, "baselines: multitask is listed twice"),
        ({"sequence": ["es"]}, "sequence must name each of the languages once: es, fr"),
        ({"finetune": {"freeze": [""]}}, "finetune.freeze: '' is no pattern of parameters"),
        ({"corpora": {**MANIFEST, "path": "{lang}/{split}.csv"}}, "corpora.path '{lang}/{split}.csv' may have"),
        ({"corpora": {**MANIFEST, "path": "{language/{split}"}}, "corpora.path '{language/{split}' may have"),
        (
            {"corpora": {**MANIFEST, "max_seconds": 31}},
            "corpora.max_seconds should be less than or equal to 30, not",
        ),
    ],
)
def test_wrong_setting_is_named_with_its_cause(changes: dict[str, Any], message: str) -> None:
    assert refusal(**changes).startswith(message)


def test_merge_weights_are_of_what_is_merged() -> None:
    together = experiment(finetune={"tasks": "together"}, merge={"weights": {"es": 2, "fr-transcribe": 0.5}})
    loaded = parse_experiment(together)
    assert [loaded.weight(expert) for expert in loaded.merged] == [2, 0.5]
    own = parse_experiment(experiment(merge={"weights": {"es": 2, "es-translate": 0.5}}))
    assert [own.weight(expert) for expert in own.merged] == [2, 0.5, 1, 1]


def test_missing_setting() -> None:
    data = experiment()
    del data["output"]
    with pytest.raises(ConfigError, match=r"^the experiment: 'output' is missing: add it$"):
        parse_experiment(data)


def test_values_as_yaml_writes_them() -> None:
    """PyYAML reads 5e-4, without a point, as a string."""
    data = yaml.safe_load("finetune: {learning_rate: 5e-4}\nmerge: {scaling: 0.3}\n")
    loaded = parse_experiment(experiment(**data))
    assert loaded.finetune.learning_rate == 5e-4
    assert loaded.merge.scaling == 0.3


@pytest.mark.parametrize(
    ("change", "path", "value"),
    [
        ("prune.rank_ratio=0.25", "prune.rank_ratio", 0.25),
        ("languages=[de, it]", "languages", ("de", "it")),
        ("finetune.freeze=['model.encoder.*']", "finetune.freeze", ("model.encoder.*",)),
        ("finetune.steps = 7", "finetune.steps", 7),
        ("merge.scaling=0.4", "merge.scaling", 0.4),
        ("merge.scaling.search=[0.1, 1]", "merge.scaling.search", (0.1, 1.0)),
        ("corpora.overrides.es.train=9", "corpora.overrides.es", Limits(train=9)),
        ("finetune.learning_rate=", "finetune.learning_rate", None),
        ("output=a=b", "output", Path("a=b")),
    ],
)
def test_set(tmp_path: Path, change: str, path: str, value: Any) -> None:
    found: Any = load_experiment(write(tmp_path, experiment(merge={"scaling": 0.1})), [change])
    for part in path.split("."):
        found = found[part] if isinstance(found, dict) else getattr(found, part)
    assert found == value


def test_later_changes_win_and_build_on_earlier_ones(tmp_path: Path) -> None:
    changes = ["finetune.steps=1", "merge.scaling.metric=loss", "merge.scaling.search=[1]", "finetune.steps=2"]
    loaded = load_experiment(write(tmp_path, experiment()), changes)
    assert loaded.finetune.steps == 2
    assert loaded.merge.scaling == ScalingSearch(search=(1.0,), metric="loss")


def test_a_key_twice_in_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--set 'merge=.*': .* the key 'scaling' is on line 1"):
        load_experiment(write(tmp_path, experiment()), ["merge={scaling: 1, scaling: 2}"])


def test_a_yaml_merge_may_be_written_over(tmp_path: Path) -> None:
    text = yaml.safe_dump(experiment(), sort_keys=False) + (
        "merge:\n  searches:\n    ties: &own {search: [1], metric: loss}\n    lors: {<<: *own, metric: score}\n"
    )
    searches = load_experiment(write(tmp_path, text), ["merge.scaling=0.4"]).merge.searches
    assert searches["lors"] == ScalingSearch(search=(1.0,), metric="score")


@pytest.mark.parametrize(
    "change", ["prune.rank_ratio", "=1", "prune.rank_ratio=[1", "prune.rank_ratio=zero", "x.y=1", "output=2026-99-99"]
)
def test_bad_set(tmp_path: Path, change: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_experiment(write(tmp_path, experiment()), [change])
    assert (change.partition("=")[0].removesuffix(".y") or change) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- base\n- starter\n", "must be a mapping"),
        ("", "must be a mapping"),
        ("base: [starter\n", "is not valid YAML"),
        ("base: !!python/object:os.system x\n", "is not valid YAML"),
        ("base: \x00\n", "is not valid YAML"),
        (
            "base: starter\nfinetune: {steps: 1}\nmerge: {}\nfinetune: {learning_rate: 1}\n",
            "is not valid YAML: the key 'finetune' is on line 2 and again on line 4; keep one of them",
        ),
        ("output: 2026-13-01\n", "month must be in 1..12; put a text that looks like a date or a number in quotes"),
        ("merge:\n  weights: {es: 1, 'es': 2}\n", "the key 'es' is on line 2 and again on line 2"),
    ],
)
def test_files_that_hold_no_experiment(tmp_path: Path, text: str, words: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=words) as caught:
        load_experiment(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml does not exist"):
        load_experiment(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match=r"cannot be read: .*directory"):
        load_experiment(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("base: é".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"cannot be read: .*utf-8"):
        load_experiment(tmp_path / "latin.yaml")


def test_frozen() -> None:
    loaded = parse_experiment(experiment())
    for section, name in ((loaded, "base"), (loaded.finetune, "steps"), (loaded.corpora, "seed")):
        with pytest.raises(pydantic.ValidationError, match="frozen"):
            setattr(section, name, getattr(section, name))


@given(
    seed=st.integers(0, 2**40),
    rate=st.none() | st.floats(1e-7, 1),
    scaling=st.floats(0, 3) | st.builds(lambda s: {"search": s}, st.lists(st.floats(0, 3), min_size=1)),
    corpora=st.sampled_from(
        [
            {"source": "synthetic", "overrides": {"fr": {"train": 3}}},
            {**MANIFEST, "columns": {"text": "a"}, "overrides": {"fr": {"path": "fr-{split}.csv"}}},
        ]
    ),
)
def test_round_trip_through_json(seed: int, rate: float | None, scaling: Any, corpora: dict[str, Any]) -> None:
    """Prefect hands an experiment to other processes this way."""
    changes = {"finetune": {"seed": seed, "learning_rate": rate}, "merge": {"scaling": scaling}, "corpora": corpora}
    loaded = parse_experiment(experiment(**changes))
    again = parse_experiment(json.loads(json.dumps(loaded.model_dump(mode="json"))))
    assert again == loaded
    assert again.corpora.of("fr") == loaded.corpora.of("fr") != loaded.corpora.of("es")


def test_overrides_leave_the_rest_as_for_all() -> None:
    corpora = {**MANIFEST, "columns": {"text": "sentence", "audio": "file"}, "limits": {"train": 100, "test": 7}}
    corpora["overrides"] = {"es": {"columns": {"text": "frase"}, "limits": {"train": 5}}}
    loaded = parse_experiment(experiment(corpora=corpora)).corpora
    assert isinstance(loaded, ManifestCorpora)
    assert loaded.of("es").columns == {"text": "frase", "audio": "file"}
    assert loaded.of("es").limits == Limits(train=5, test=7)
    assert loaded.of("es").path == MANIFEST["path"]
    assert loaded.of("fr") == loaded

    synthetic = parse_experiment(
        experiment(corpora={"source": "synthetic", "utterances": {"test": 7}, "overrides": {"es": {"train": 5}}})
    ).corpora
    assert isinstance(synthetic, SyntheticCorpora)
    counts = synthetic.of("es").utterances
    assert (counts.train, counts.validation, counts.test) == (5, synthetic.utterances.validation, 7)


def test_a_language_may_have_a_source_of_its_own() -> None:
    own = {"source": "folder", "path": "spoken/fr", "hours": {"train": 2}}
    loaded = parse_experiment(
        experiment(corpora={"source": "synthetic"}, corpora_of={"fr": own, "it": own | {"path": "spoken/it"}})
        | {"evaluate": {"guard": ["it"]}}
    )
    assert loaded.spoken == ("es", "fr", "it")
    assert [loaded.speech_of(language).source for language in loaded.spoken] == ["synthetic", "folder", "folder"]
    assert loaded.speech_of("it").path == "spoken/it"  # type: ignore[union-attr]
    assert loaded.speech_of("fr").hours.train == 2  # type: ignore[union-attr]


def test_a_language_that_experts_are_held_on_has_speech_too() -> None:
    own = {"source": "folder", "path": "spoken/nl", "limits": {"train": 50}}
    finetune = {"preserve": {"speech": ["nl", "fr"]}}
    given = experiment(corpora={"source": "synthetic"}, corpora_of={"nl": own}, finetune=finetune)
    loaded = parse_experiment(given)
    assert (loaded.spoken, loaded.heard) == (("es", "fr"), ("es", "fr", "nl"))
    assert loaded.speech_of("nl").first("train", 100).limits.train == 50  # type: ignore[union-attr]
    assert loaded.speech_of("nl").first("train", 20).limits.train == 20  # type: ignore[union-attr]
    assert loaded.speech_of("nl").first("test", 20).limits.test == 20  # type: ignore[union-attr]
    assert loaded.speech_of("fr").first("train", 20).utterances.train == 20  # type: ignore[union-attr]


def test_overrides_of_a_data_set() -> None:
    corpora = {"source": "datasets", "preset": "fleurs", "splits": {"train": "a"}, "hours": {"train": 5, "test": 1}}
    corpora["overrides"] = {"es": {"name": "es_mx", "splits": {"test": "b"}, "hours": {"train": 3}}}
    es, fr = (parse_experiment(experiment(corpora=corpora)).speech_of(language) for language in ("es", "fr"))
    assert isinstance(es, DatasetsCorpora)
    assert isinstance(fr, DatasetsCorpora)
    assert (es.name, es.splits, es.hours) == ("es_mx", {"train": "a", "test": "b"}, Hours(train=3, test=1))
    assert (fr.name, fr.splits, fr.hours) == (None, {"train": "a"}, Hours(train=5, test=1))


@pytest.mark.parametrize(
    "told_apart",
    [
        {"name": "{language}"},
        {"preset": "covost2"},
        {"overrides": {"fr": {"path": "a/c"}}},
        {"overrides": {"fr": {"revision": "fr"}}},
        {"overrides": {"fr": {"splits": {"train": "fr"}}}},
        {"overrides": {"fr": {"columns": {"audio": "fr"}}}},
    ],
)
def test_languages_of_one_data_set_are_told_apart(told_apart: dict[str, Any]) -> None:
    corpora = {"source": "datasets", "path": "a/b", **told_apart}
    assert parse_experiment(experiment(corpora=corpora)).languages == ("es", "fr")


def test_weights_by_expert_go_before_those_by_language() -> None:
    loaded = parse_experiment(experiment(merge={"weights": {"es": 0.5, "es-translate": 2}}))
    assert {expert.id: loaded.weight(expert) for expert in loaded.experts} == {
        "es-transcribe": 0.5,
        "es-translate": 2.0,
        "fr-transcribe": 1.0,
        "fr-translate": 1.0,
    }


def test_a_recipe_holds_the_parameters_and_the_groups() -> None:
    merge = {"parameters": {"ties": {"density": 0.3}}, "groups": {"encoder": {"rank_ratio": 0.05, "scaling": 0.2}}}
    loaded = parse_experiment(experiment(merge=merge, compare=["ties", "sparse"], prune={"density": 0.2}))
    assert loaded.recipe("ties").steps[0].density == 0.3  # type: ignore[union-attr]
    pruning = loaded.recipe("sparse").pruning
    assert pruning is not None
    assert (pruning.composition, pruning.density) == ("sparse", 0.2)
    assert pruning.of("model.encoder.fc1.weight", (8, 8)) == (0.05, 0.2)
    assert loaded.recipe("lors").scaling_of("model.encoder.fc1.weight", (8, 8)) == 0.2
