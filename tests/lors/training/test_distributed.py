"""Several processes that train one model together: two real ones, on CPUs, with gloo."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import within
from safetensors.torch import load_file
from training_jobs import OtherPrompts, assert_same, examples, log_of, settings, steps_of, tiny_model

from lors.errors import ConfigError, StepFailedError
from lors.training import distributed
from lors.training.distributed import launch
from lors.training.finetune import fine_tune

LAYERS = {"encoder_layers": 2, "decoder_layers": 2}
SETTINGS = {
    "batch_seconds": 9.0, "accumulate": 2, "ema": 0.9, "validation": {"every": 4, "metric": "loss"},
    "augment": {"speed": [0.9, 1.1]}, "preserve": {"weight": 0.5},
}  # fmt: skip


def train(
    work: Path, report: Callable[[Mapping[str, Any]], None] = lambda event: None, **arguments: Any
) -> dict[str, Any]:
    """Two processes; their weights are in `work` / `out.safetensors`."""
    given = {
        "settings": SETTINGS,
        "options": LAYERS,
        "work": str(work),
        "out": str(work / "out.safetensors"),
    } | arguments
    given["settings"] = settings(**given["settings"]).model_dump(mode="json")
    return launch("training_jobs:together", given, 2, report, work, packages=("training_jobs",))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[Any]]:
    work, events = tmp_path_factory.mktemp("undisturbed"), []
    return work, train(work, events.append), events


def test_two_processes_train_the_model_of_one(
    tmp_path: Path, undisturbed: tuple[Path, dict[str, Any], list[Any]]
) -> None:
    """With parts, an average and validations; the batches hold 1 to 6 utterances, so shares are uneven or empty."""
    two, result, events = undisturbed
    model = tiny_model(**LAYERS)
    expected = fine_tune(model, examples(), examples(3), settings(**SETTINGS), tmp_path, prompts=OtherPrompts())
    found = load_file(two / "out.safetensors")
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, tensor in model.named_parameters():
        assert torch.allclose(found[name], tensor, rtol=1e-3, atol=1e-4), name
    training = two / "training"
    losses = [[entry["loss"] for entry in steps_of(folder)] for folder in (training, tmp_path)]
    assert losses[0] == pytest.approx(losses[1], abs=3e-5)
    assert [entry["step"] for entry in log_of(training)] == [entry["step"] for entry in log_of(tmp_path)]
    assert [event["done"] for event in events] == [entry["step"] for entry in log_of(training)]
    assert result["best_step"] == expected["best_step"]
    assert result["validation_loss"] == pytest.approx(expected["validation_loss"], abs=1e-4)
    assert sorted(path.name for path in two.iterdir()) == ["out.safetensors", "training"]


def test_whatever_ends_them_they_resume_exactly(
    tmp_path: Path, undisturbed: tuple[Path, dict[str, Any], list[Any]]
) -> None:
    def stop(event: Mapping[str, Any]) -> None:
        if event["done"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StepFailedError, match=r"stopped after step \d+ of 12: its checkpoint is written") as stopped:
        train(tmp_path, stop)
    assert signal.getsignal(signal.SIGTERM) == before
    done = len(steps_of(tmp_path / "training"))
    assert f"after step {done} of" in str(stopped.value)

    with pytest.raises(StepFailedError) as dead:
        train(tmp_path, die=2)
    # torchrun ends the other one, on a busy machine before that has told what it met.
    known = r"lost process 2 of 2 \(killed: out of memory\?\)|ended its processes with exit code 1"
    assert re.match(f"training_jobs:together ({known})", str(dead.value))
    assert str(dead.value).endswith("; run the same command again to resume.")
    assert "\n" not in str(dead.value)
    assert not ours(tmp_path)

    steps: list[int] = []
    train(tmp_path, lambda event: steps.append(event["done"]))
    assert steps[0] in (done + 1, done + 2, done + 3)
    assert_same(load_file(tmp_path / "out.safetensors"), load_file(undisturbed[0] / "out.safetensors"))
    logs = [(work / "training" / "train.jsonl").read_bytes() for work in (tmp_path, undisturbed[0])]
    assert logs[0] == logs[1]


def test_an_error_is_itself(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^this process wants other settings$"):
        train(tmp_path, refuse=1)


def test_what_is_not_in_the_packages_is_not_called(tmp_path: Path) -> None:
    for call in ("os:system", "lors.stages", "lors.stages:fine_tune()"):
        with pytest.raises(ValueError, match="is not a function in lors"):
            launch(call, {}, 2, lambda event: None, tmp_path)


def test_fewer_gpus_than_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match=r"2 processes train together, but 1 GPUs are visible"):
        launch("lors.stages.training:train", {}, 2, lambda event: None, tmp_path)


def test_the_processes_end_with_the_launching_one(tmp_path: Path) -> None:
    """And layers that one process drops and the other does not do no harm."""
    child = os.fork()
    if child == 0:
        try:
            train(tmp_path, options={**LAYERS, "encoder_layerdrop": 0.5}, settings={**SETTINGS, "steps": 100_000})
        finally:
            os._exit(1)
    log = tmp_path / "training" / "train.jsonl"
    assert within(60, lambda: log.exists() and len(log.read_bytes().splitlines()) > 20)
    assert len(ours(tmp_path)) == 3  # torchrun and two
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert within(30, lambda: not ours(tmp_path))


def ours(work: Path) -> list[Path]:
    """The processes that `launch` started and that are still alive."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            words = (process / "cmdline").read_bytes().split(b"\0")
            if distributed.__name__.encode() in words and any(word.startswith(bytes(work)) for word in words):
                found.append(process)
    return found
