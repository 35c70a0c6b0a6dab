"""Killed at any moment, a training ends in the same weights, bit for bit; and what a checkpoint refuses."""

from __future__ import annotations

import hashlib
import itertools
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from speech_sounds import utterance
from training_jobs import (
    InterruptedTrainingError,
    assert_same,
    examples,
    interrupt_at,
    log_of,
    settings,
    steps_of,
    tiny_model,
    weights,
)

from lors import stages
from lors.errors import InputError, StepFailedError
from lors.isolate import Slots
from lors.speech.corpus import SPLITS, Candidate, write_split
from lors.starter import MODEL_FOLDER
from lors.training import finetune
from lors.training.checkpoint import Checkpoint
from lors.training.finetune import LOG, fine_tune
from lors.training.signals import stop_on_sigterm

RANDOM = {
    "dropout": 0.2, "encoder_layerdrop": 0.4, "encoder_layers": 2, "apply_spec_augment": True, "mask_time_prob": 0.3,
    "mask_time_length": 4,
}  # fmt: skip
EVERYTHING = {
    "steps": 30, "weight_decay": 0.1, "ema": 0.8, "accumulate": 3, "label_smoothing": 0.1, "schedule": "cosine",
    "sampling_temperature": 2.0, "gradient_checkpointing": True,
    "augment": {"speed": [0.9, 1.0, 1.1], "spec_augment": {"frequency_bins": 8}},
    "validation": {"every": 2, "patience": 4},
}  # fmt: skip
LORA = {"rank": 2, "dropout": 0.1, "targets": ["q_proj", "fc1"]}


def arbitrary(model: Any) -> float:
    """Goes up and down from one validation to the next, and depends on every bit of the weights."""
    digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters()))
    return digest.digest()[0] / 2.55


CASES = {
    "plain": ({}, {"weight_decay": 0.1}),
    "dropout, layer drop and the base's SpecAugment": (RANDOM, {"weight_decay": 0.1}),
    "everything": (RANDOM, EVERYTHING),
    "everything, LoRA": (RANDOM, {**EVERYTHING, "lora": LORA, "learning_rate": 3e-2}),
}


# Those with everything are slow: each has one of the two rhythms.
@pytest.mark.parametrize(
    ("case", "each"),
    [
        *itertools.product(list(CASES)[:2], (1, 4)),
        ("everything", 1),
        ("everything, LoRA", 4),
    ],
)
def test_resumes_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, each: int) -> None:
    options, changes = CASES[case]
    own, found, validation = settings(**changes), examples(), examples(3)
    undisturbed = tiny_model(**options)
    expected = fine_tune(undisturbed, found, validation, own, tmp_path / "a", score=arbitrary)
    counts = itertools.count(1)
    monkeypatch.setattr(Checkpoint, "due", lambda self: next(counts) % each == 0)
    moments = [(1, "loss"), (3, "loss"), (3, "loss"), (8, "loss"), (expected["steps"], "loss")]
    if own.validation is not None:  # after the best weights were written, before the checkpoint that knows of them
        every = own.validation.every
        moments += [(step, "validation_score") for step in range(every, expected["steps"] + 1, every)]
    for step, key in sorted(moments):
        counts = itertools.count(1)
        try:
            report = interrupt_at(step, key)
            fine_tune(tiny_model(**options), found, [], own, tmp_path / "b", report, score=arbitrary)
        except InterruptedTrainingError:
            with (tmp_path / "b" / LOG).open("a") as log:
                log.write('{"step": 1')  # half a line
    resumed = tiny_model(**options)
    result = fine_tune(resumed, found, validation, own, tmp_path / "b", score=arbitrary)
    assert_same(weights(resumed), weights(undisturbed))
    for key in expected.keys() & {"validation_loss", "best_step", "best_value", "steps"}:
        assert result[key] == expected[key]
    assert (tmp_path / "a" / LOG).read_bytes() == (tmp_path / "b" / LOG).read_bytes()


def test_the_cases_stop_early_at_a_best_step_in_between(tmp_path: Path) -> None:
    """Else the test above would not see what it is there for."""
    options, changes = CASES["everything"]
    result = fine_tune(tiny_model(**options), examples(), [], settings(**changes), tmp_path, score=arbitrary)
    assert 2 < result["best_step"] < result["steps"] < 30


@pytest.mark.usefixtures("often")
def test_resumes_where_it_stopped(tmp_path: Path) -> None:
    with pytest.raises(InterruptedTrainingError):
        fine_tune(tiny_model(), examples(), [], settings(), tmp_path, interrupt_at(7))
    done: list[int] = []
    fine_tune(tiny_model(), examples(), [], settings(), tmp_path, lambda event: done.append(event["done"]))
    assert done == [7, 8, 9, 10, 11, 12]  # the checkpoint was that of step 6


def test_the_scale_of_fp16_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def scaler(*_: Any) -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-60, growth_interval=2)

    monkeypatch.setattr(finetune, "scaler_for", scaler)
    undisturbed, resumed = tiny_model(), tiny_model()
    expected = fine_tune(undisturbed, examples(), [], settings(), tmp_path / "a")
    assert expected["skipped_steps"] == 1
    for _ in range(5):
        with pytest.raises(StepFailedError):
            fine_tune(tiny_model(), examples(), [], settings(), tmp_path / "b", stop=lambda: True)
    result = fine_tune(resumed, examples(), [], settings(), tmp_path / "b")
    assert result["skipped_steps"] == 1
    assert_same(weights(resumed), weights(undisturbed))


def test_checkpoints_are_rare(tmp_path: Path) -> None:
    """At most one a minute: a training of a second writes none."""
    fine_tune(tiny_model(), examples(), [], settings(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [LOG]


def test_seeds_differ(tmp_path: Path) -> None:
    models = [tiny_model() for _ in range(3)]
    for number, (model, seed) in enumerate(zip(models, (0, 0, 10**20), strict=True)):
        fine_tune(model, examples(), [], settings(seed=seed), tmp_path / str(number))
    assert_same(weights(models[0]), weights(models[1]))
    assert not torch.equal(models[0].proj_out.weight, models[2].proj_out.weight)


# What a checkpoint refuses


def interrupted(work: Path, **changes: Any) -> Path:
    with pytest.raises(InterruptedTrainingError):
        fine_tune(tiny_model(), examples(), [], settings(**changes), work, interrupt_at(7), score=arbitrary)
    return work / "checkpoint.safetensors"


@pytest.mark.parametrize("damage", ["cut short", "empty", "text", "without metadata", "without its best weights"])
@pytest.mark.usefixtures("often")
def test_a_damaged_checkpoint_is_said_and_not_used(tmp_path: Path, damage: str) -> None:
    own: dict[str, Any] = {"validation": {"every": 3}}
    path = interrupted(tmp_path, **own)
    if damage == "cut short":
        os.truncate(path, path.stat().st_size - 100)
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "text":
        path.write_text("nothing of the kind" * 1000)
    elif damage == "without metadata":
        from safetensors.torch import load_file, save_file

        save_file(load_file(path), path)
    else:
        (tmp_path / "best.safetensors").unlink()
    events: list[Any] = []
    model, undisturbed = tiny_model(), tiny_model()
    fine_tune(model, examples(), [], settings(**own), tmp_path, events.append, score=arbitrary)
    messages = [event["message"] for event in events if "message" in event]
    assert len(messages) == 1
    assert messages[0].startswith(f"{path} cannot be used (")
    assert messages[0].endswith("): the training starts from its beginning")
    assert [entry["step"] for entry in steps_of(tmp_path)] == list(range(1, 13))
    fine_tune(undisturbed, examples(), [], settings(**own), tmp_path / "other", score=arbitrary)
    assert_same(weights(model), weights(undisturbed))


@pytest.mark.parametrize(
    ("changes", "count", "options", "words"),
    [
        ({"learning_rate": 1e-3, "steps": 20}, 12, {}, "whose finetune.steps, finetune.learning_rate differ"),
        ({}, 11, {}, "whose training examples differ"),
        ({}, 12, {"d_model": 32}, "whose trained weights differ"),
    ],
)
@pytest.mark.usefixtures("often")
def test_a_checkpoint_of_another_training(
    tmp_path: Path, changes: dict[str, Any], count: int, options: dict[str, Any], words: str
) -> None:
    path = interrupted(tmp_path)
    before = path.read_bytes(), (tmp_path / LOG).read_bytes()
    with pytest.raises(InputError) as caught:
        fine_tune(tiny_model(**options), examples(count), [], settings(**changes), tmp_path)
    assert f"{path} is of another training, {words}: give another work folder" in str(caught.value)
    assert (path.read_bytes(), (tmp_path / LOG).read_bytes()) == before


# Real signals


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


@pytest.mark.usefixtures("often", "one_thread")
def test_kill_9_and_resume_give_the_same_files(tmp_path: Path) -> None:
    """The whole stage, its child process killed in the middle: every published file has the undisturbed digest."""
    corpus = tmp_path / "corpus"
    for number, split in enumerate(SPLITS):
        rows = [utterance(10 * number + i, 0.5 + 0.3 * i) for i in range(4)]
        candidates = [
            Candidate(u.id, u.text, u.translation, None, lambda u=u: (u.audio(), 16_000))  # type: ignore[misc]
            for u in rows
        ]
        write_split(candidates, corpus / f"{split}.parquet", language="es")
    own = settings(steps=8, batch_seconds=4, validation={"every": 3, "metric": "loss"}, ema=0.9)

    def arguments(name: str) -> dict[str, Any]:
        out = tmp_path / name
        out.mkdir(exist_ok=True)
        return {
            "settings": {"parts": [["es", "translate"]], "finetune": own.model_dump(mode="json")},
            "inputs": {"train-es": str(corpus), "validation-es": str(corpus)},
            "places": {"base": str(MODEL_FOLDER)},
            "out": str(out),
            "work": str(tmp_path / f"{name}-work"),
            "threads": 1,
        }

    with Slots(1, threads=1, packages=("training_jobs",)) as slots, pytest.raises(StepFailedError, match="SIGKILL"):
        slots.run("training_jobs:killed_stage", {**arguments("killed"), "step": 5}, log=tmp_path / "log.txt")
    steps: list[int] = []
    stages.fine_tune(**arguments("killed"), report=lambda event: steps.append(event["done"]))
    assert steps == [5, 6, 6, 7, 8, 8]  # the validations too
    stages.fine_tune(**arguments("undisturbed"), report=lambda event: None)
    found = digests(tmp_path / "killed")
    assert found == digests(tmp_path / "undisturbed")
    assert {"model.safetensors", "config.json", "tokenizer.json", LOG} <= found.keys()
    assert [entry["step"] for entry in log_of(tmp_path / "killed")] == [1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 8]


def test_sigterm_ends_a_training_at_a_checkpoint(tmp_path: Path) -> None:
    def terminate(event: Any) -> None:
        if event["done"] == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    assert threading.current_thread() is threading.main_thread()
    with stop_on_sigterm() as stop, pytest.raises(StepFailedError, match=r"stopped after step 5 of 12"):
        fine_tune(tiny_model(), examples(), [], settings(), tmp_path, terminate, stop=stop)
    assert (tmp_path / "checkpoint.safetensors").is_file()
