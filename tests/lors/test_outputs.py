"""What a run says of its steps, from stored steps that are made up."""

from __future__ import annotations

from pathlib import Path

from lors.outputs import _training, publish_scores
from lors.steps import Step
from lors.store import Artifact, Store, step_key


def made(store: Store, stage: str, file: str, content: str) -> Artifact:
    with store.produce(stage, step_key(stage, 1, {}, {}), version=1, settings={}, inputs={}) as production:
        (production.out / file).write_text(content)
        return production.publish({}, 1.0)


def test_a_training_of_several_experts_is_told_once(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    log = '{"step": 1, "loss": 2.5}\n'
    trained = made(store, "fine_tune", "train.jsonl", log)
    artifacts = {
        "fine-tune es-transcribe": trained,
        "fine-tune es-translate": trained,
        "touch up": made(store, "touch_up", "train.jsonl", log),
        "score systems": made(store, "score_systems", "summary.json", '{"systems": {}}'),
    }
    steps = {name: Step(name, artifact.stage, {}) for name, artifact in artifacts.items()}

    def states(*computed: str) -> list[str]:
        found = publish_scores(tmp_path / "out", steps, artifacts, computed, store)["steps"]
        assert [step["name"] for step in found] == list(steps)
        return [step["state"] for step in found]

    assert states(*steps) == ["run", "cached", "run", "run"]
    assert states("fine-tune es-translate") == ["cached", "run", "cached", "cached"]
    assert _training(steps, artifacts, store).splitlines()[1:] == [
        "es-transcribe and es-translate,1,2.5,,,",
        "touch up,1,2.5,,,",
    ]
