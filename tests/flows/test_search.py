"""A search by the flow never reads the test split: here it holds no speech, and all that does not need it is done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import soundfile
from flows_helpers import planned, tiny

from flows.pipeline import full_pipeline
from lors.config import Experiment, parse_experiment
from lors.errors import CorpusError
from lors.pipeline import build_steps
from lors.speech.corpora.synthetic import candidates
from lors.store import Artifact, Store

SEARCH = {"search": [0.3, 0.9], "per": "part", "factors": [0.5, 2.0], "budget": 5, "metric": "chrf"}


def write_manifest(path: Path, split: str, count: int) -> None:
    rows = []
    for number, one in enumerate(candidates("es", split, count, seed=4)):
        audio = path.with_name(f"{split}-{number}.wav")
        if split == "test":
            audio.write_text("no speech: whoever reads this fails")
        else:
            soundfile.write(audio, *one.load())
        rows.append({"audio": audio.name, "text": one.text, "translation": one.translation})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def speech(tmp_path: Path) -> Path:
    """Manifests of Spanish, of which the test split's audio is none."""
    folder = tmp_path / "speech"
    folder.mkdir()
    for split, count in (("train", 4), ("validation", 2), ("test", 2)):
        write_manifest(folder / f"{split}.jsonl", split, count)
    return folder


def curves(experiment: Experiment) -> dict[str, dict[str, Any]]:
    """What each step that selects has written."""
    store, artifacts = Store(experiment.store), dict[str, Artifact]()
    for name, step in build_steps(experiment, store).items():
        if all(source.step in artifacts for source in step.inputs.values()):
            key = step.key({role: artifacts[source.step] for role, source in step.inputs.items()})
            if (artifact := store.find(step.stage, key)) is not None:
                artifacts[name] = artifact
    return {
        name: json.loads((store.path(artifact) / "scaling.json").read_text())
        for name, artifact in artifacts.items()
        if name.startswith("select scaling")
    }


def test_the_search_is_done_without_the_test_split(prefect_api: str, speech: Path, tmp_path: Path) -> None:
    def make(**search: Any) -> Experiment:
        per_expert = SEARCH | search | {"per": "expert"}
        changes = {
            "languages": ["es"],
            "corpora": {"source": "manifest", "path": f"{speech}/{{split}}.jsonl"},
            "merge": {"scaling": SEARCH | search, "searches": {"task_arithmetic": per_expert}},
            "compare": ["task_arithmetic"],
            "diagnose": False,
        }
        return parse_experiment(tiny(tmp_path, **changes))

    experiment = make()
    every = planned(experiment)
    with pytest.raises(CorpusError, match=r"^prepare es test: 2 of 2 rows of the test split of es are bad"):
        full_pipeline(experiment)
    of_test = {name for name in every if name.startswith("evaluate")} | {"prepare es test", "score systems"}
    assert planned(experiment) == of_test
    done = every - of_test
    for steps in ("score lors at 0.3", "score lors encoder x 2", "score task_arithmetic es-transcribe x 0.5"):
        assert steps in done
    assert {"write lors", "write task_arithmetic", "score task_arithmetic es-translate x 0.5"} <= done

    found = curves(experiment)
    for method, names in (("lors", ["encoder", "decoder"]), ("task_arithmetic", ["es-transcribe", "es-translate"])):
        curve = found[f"select scaling {method}"]
        points = curve["points"]
        assert [point["coordinate"] for point in points] == [None, None, names[0], names[0], names[1]]
        best = max(point["value"] for point in points)
        chosen = [p for p in points if (p["scaling"], p["factors"]) == (curve["scaling"], curve["factors"])]
        assert [point["value"] for point in chosen] == [best]
        assert len({point["value"] for point in points}) > 1
        assert {*points[0]["values"]} == {"es-translate"}
        first = found[f"select scaling {method} (1)"]
        for point in points[2:4]:
            assert (point["scaling"], {*point["factors"]}) == (first["scaling"], {names[0]})

    # What was scored is not scored again when the search goes on.
    more = {name for name in planned(make(budget=6)) - of_test if name.startswith("score")}
    assert more == {"score lors decoder x 2", "score task_arithmetic es-translate x 2"}
    wider = planned(make(search=[0.3, 0.6, 0.9], budget=3))
    assert {name for name in wider if name.startswith("score ")} - of_test == {
        "score lors at 0.6",
        "score task_arithmetic at 0.6",
    }
