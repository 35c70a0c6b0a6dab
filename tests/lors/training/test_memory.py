"""A device whose memory runs out: the same training in smaller parts. Only GPUs raise such errors, so hooks do here."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from training_jobs import InterruptedTrainingError, assert_same, examples, interrupt_at, settings, tiny_model, weights

from lors.errors import TrainingError
from lors.training import finetune, update
from lors.training.distributed import Team
from lors.training.finetune import LOG, fine_tune

# Batches of 8 and of 4 utterances.
OWN = settings(batch_seconds=16.0)


def room_for(model: Any, rows: int, where: str = "forward") -> list[int]:
    """Let `model` run out of memory above so many rows, in one of its passes; the rows of each forward pass."""
    passes: list[int] = []

    def full(gradient: torch.Tensor) -> None:
        if len(gradient) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def look(module: Any, arguments: Any, output: Any) -> None:
        hidden = output.last_hidden_state
        passes.append(len(hidden))
        if where == "forward":
            full(hidden)
        elif hidden.requires_grad:
            hidden.register_hook(full)

    model.get_encoder().register_forward_hook(look)
    return passes


def trained(work: Path, rows: int = 100, where: str = "forward", **changes: Any) -> tuple[Any, list[int], list[str]]:
    """The model, the rows of its forward passes, and what was said."""
    model, events = tiny_model(), list[Any]()
    passes = room_for(model, rows, where)
    fine_tune(model, examples(), [], OWN.model_copy(update=changes), work, events.append)
    return model, passes, [event["message"] for event in events if "message" in event]


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize(("rows", "accumulate"), [(5, 1), (2, 1), (1, 1), (2, 2)])
def test_smaller_parts_train_the_same_model(tmp_path: Path, where: str, rows: int, accumulate: int) -> None:
    plain, _, nothing = trained(tmp_path / "plain", accumulate=accumulate)
    assert nothing == []
    small, passes, said = trained(tmp_path / "small", rows, where, accumulate=accumulate)
    for name, tensor in weights(plain).items():
        assert torch.allclose(weights(small)[name], tensor, rtol=1e-5, atol=1e-6), name
    # Each time it ran out it said so, and did not try as many again.
    tried = [number for number in passes if number > rows]
    assert 1 <= len(said) == len(tried) <= 4
    assert said[-1].endswith(
        f"in {2 ** len(said)} times as many parts, for the same updates; finetune.accumulate: "
        f"{accumulate * 2 ** len(said)} does so from the first step on"
    )


@pytest.mark.usefixtures("often")
def test_a_resumed_training_stays_in_smaller_parts(tmp_path: Path) -> None:
    undisturbed, _, said = trained(tmp_path / "a", 2)
    assert len(said) > 1
    for step in (1, 2, 9):
        model = tiny_model()
        room_for(model, 2)
        with pytest.raises(InterruptedTrainingError):
            fine_tune(model, examples(), [], OWN, tmp_path / "b", interrupt_at(step))
    resumed, passes, said = trained(tmp_path / "b", 2)
    assert said == []
    assert max(passes) <= 2
    assert_same(weights(resumed), weights(undisturbed))
    assert (tmp_path / "a" / LOG).read_bytes() == (tmp_path / "b" / LOG).read_bytes()


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_utterance_that_does_not_fit(tmp_path: Path, where: str) -> None:
    with pytest.raises(TrainingError) as caught:
        trained(tmp_path, 0, where)
    message = str(caught.value)
    assert message.startswith("a single utterance of step 1 does not fit in the memory of the device: set finetune.")
    for name in ("gradient_checkpointing", "freeze", "lora", "window", "batch_seconds", "docs/training.md"):
        assert name in message


def test_several_processes_end_in_a_sentence() -> None:
    """They cannot do a step's parts again: the others may be past them."""
    model = tiny_model()
    room_for(model, 0)
    with finetune.trained(model, (), None, 0) as parameters:
        state = finetune._start(model, parameters, OWN, 1e-3, torch.float32)
        speech = finetune._inputs(model, examples(), "auto")
        run: Any = SimpleNamespace(
            model=model,
            together=model,
            settings=OWN,
            state=state,
            us=Team(1, 2, model.device),
            dtype=torch.float32,
            base=None,
        )
        with pytest.raises(TrainingError, match="the share of step 1 of one of 2 processes does not fit in the memory"):
            finetune._gradient(run, speech.batch(speech.once(4.0)[0]))
        assert all(parameter.grad is None for parameter in parameters.values())


def test_other_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimizer's, which no smaller part of a batch makes less."""

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(update, "apply", full)
    with pytest.raises(TrainingError, match=r"^the training does not fit in the memory of the device: set finetune"):
        trained(tmp_path)
