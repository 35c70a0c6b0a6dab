"""What a training shows in Prefect's API while it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client

from tasks import training_view
from tasks.training_view import TrainingView


def shown(key: str) -> list[Any]:
    with get_client(sync_client=True) as client:
        query = {"artifacts": {"key": {"any_": [key]}}}
        return [artifact["data"] for artifact in client.request("POST", "/artifacts/filter", json=query).json()]


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_view, "_SECONDS", 0.0)


def test_a_training_moves_one_progress_and_one_curve(prefect_api: str, at_once: None, tmp_path: Path) -> None:
    view = TrainingView("fine-tune xa-transcribe")
    view({"done": 3, "total": 60, "unit": "utterances"})
    assert shown("fine-tune-xa-transcribe-progress") == []
    view({"done": 1, "total": 4, "unit": "steps", "step": 1, "loss": 2.5})
    assert shown("fine-tune-xa-transcribe-progress") == [25.0]
    view({"done": 2, "total": 4, "unit": "steps", "step": 2, "loss": 1.5, "validation_loss": 2.25})
    assert shown("fine-tune-xa-transcribe-progress") == [50.0]
    [text] = shown("fine-tune-xa-transcribe-loss")
    assert text.startswith("50 %, step 2: loss 1.5, validation loss 2.25\n\n![Loss](data:image/svg+xml;base64,")
    # A resumed training has the steps before it in its log alone.
    (tmp_path / "log.jsonl").write_text("".join(json.dumps({"step": n, "loss": 1 / n}) + "\n" for n in range(1, 5)))
    view.finish(tmp_path / "log.jsonl")
    assert shown("fine-tune-xa-transcribe-progress") == [100.0]
    assert [text.partition("\n")[0] for text in shown("fine-tune-xa-transcribe-loss")] == ["100 %, step 4: loss 0.25"]


def test_a_training_on_a_worker_has_its_curve_when_it_is_done(prefect_api: str, at_once: None, tmp_path: Path) -> None:
    view = TrainingView("fine-tune xb-translate")
    for percent in (20, 70):
        view({"done": percent, "total": 100, "unit": "%", "note": "on a worker"})
    assert shown("fine-tune-xb-translate-progress") == [70.0]
    assert shown("fine-tune-xb-translate-loss") == []
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    view.finish(tmp_path / "log.jsonl")
    assert shown("fine-tune-xb-translate-progress") == [100.0]
    assert len(shown("fine-tune-xb-translate-loss")) == 1


def test_the_api_is_asked_at_most_once_in_ten_seconds(prefect_api: str) -> None:
    view = TrainingView("fine-tune xc-transcribe")
    for step in (1, 2, 3):
        view({"done": step, "total": 4, "unit": "steps", "step": step, "loss": 1.0})
    assert shown("fine-tune-xc-transcribe-progress") == [25.0]
