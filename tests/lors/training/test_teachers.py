"""Targets that experts give: each its own utterances, and what a training does with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import kl_div
from training_jobs import InterruptedTrainingError, assert_same, examples, interrupt_at, settings, tiny_model, weights

from lors.errors import InputError
from lors.speech.architecture import architecture_of
from lors.training.finetune import fine_tune
from lors.training.inputs import Inputs, Part
from lors.training.teachers import Teachers

GROUPS = ["group 0", "group 1", "group 2"]


def other_model(seed: int, model: Any | None = None) -> Any:
    """Another decoder; the encoder of `tiny_model`."""
    found = tiny_model() if model is None else model
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in found.model.decoder.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return found


def teachers(*models: Any, share: float = 1.0) -> dict[str, Any]:
    return dict(zip(GROUPS, models, strict=True))


def part() -> Part:
    model = tiny_model()
    speech = Inputs(examples(), architecture_of(model), model.config, 2.0)
    (drawn,) = speech.once(100.0)
    (found,) = speech.batch(drawn).parts
    return found


def answers(models: Any, frozen: bool, split: int = 1) -> torch.Tensor:
    model, found = tiny_model(), []
    taught = Teachers.of(models, GROUPS, 1.0, model, frozen)
    for piece in part().split(split):
        heard = model.get_encoder()(piece.inputs["input_features"]).last_hidden_state
        found.append(taught.logits(piece.inputs, piece.groups, heard))
    return torch.cat(found)


@pytest.mark.parametrize(("frozen", "split"), [(True, 1), (False, 1), (True, 5)])
def test_each_utterance_is_taught_by_the_model_of_its_group(frozen: bool, split: int) -> None:
    first, second = other_model(1), other_model(2)
    found = answers(teachers(first, second, first), frozen, split)
    one = part()
    for row, place in enumerate(one.groups.tolist()):
        own = {name: tensor[row : row + 1] for name, tensor in one.inputs.items()}
        with torch.no_grad():
            expected = other_model(2 if place == 1 else 1)(**own).logits[0]
        torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-5)


def test_encoders_that_differ_are_each_computed() -> None:
    with torch.no_grad():
        different = other_model(2)
        different.model.encoder.conv1.weight += 0.1
    taught = Teachers.of(teachers(other_model(1), different, other_model(1)), GROUPS, 1.0, tiny_model(), frozen=True)
    assert not taught.shares_encoder
    assert taught.models[0].get_encoder() is not taught.models[1].get_encoder()


def test_equal_encoders_are_in_memory_once() -> None:
    models = teachers(other_model(1), other_model(2), other_model(3))
    for frozen in (True, False):
        taught = Teachers.of(models, GROUPS, 1.0, tiny_model(), frozen)
        assert taught.shares_encoder is frozen
        assert len({id(model.get_encoder()) for model in taught.models}) == 1


def run(work: Path, report: Any = lambda event: None, share: float = 1.0, **changes: Any) -> Any:
    model, teacher = tiny_model(), other_model(1)
    fine_tune(
        model,
        examples(),
        [],
        settings(**{"steps": 40, "freeze": ["encoder"], **changes}),
        work,
        report,
        teachers=teachers(teacher, teacher, teacher) if share else None,
        share=share,
    )
    return model


def distance(model: Any) -> float:
    """From the teacher, a token."""
    one = part()
    with torch.no_grad():
        said, meant = (m(**one.inputs).logits.log_softmax(2) for m in (model, other_model(1)))
    wanted = one.labels != -100
    return float(kl_div(said[wanted], meant[wanted], log_target=True, reduction="batchmean"))


def test_a_taught_model_comes_nearer_to_its_teacher(tmp_path: Path) -> None:
    taught, half, free = (run(tmp_path / str(share), share=share) for share in (1.0, 0.5, 0.0))
    assert distance(taught) < distance(half) < distance(free)
    assert distance(taught) < 0.8 * distance(tiny_model())


@pytest.mark.usefixtures("often")
def test_a_resumed_training_has_its_teachers_again(tmp_path: Path) -> None:
    whole = run(tmp_path / "a", share=0.5, steps=12)
    with pytest.raises(InterruptedTrainingError):
        run(tmp_path / "b", interrupt_at(7), share=0.5, steps=12)
    with pytest.raises(InputError, match="share of the teachers"):
        run(tmp_path / "b", share=0.75, steps=12)
    assert_same(weights(run(tmp_path / "b", share=0.5, steps=12)), weights(whole))


def test_parts_of_a_batch_are_taught_alike(tmp_path: Path) -> None:
    whole, parts = run(tmp_path / "a", steps=3), run(tmp_path / "b", steps=3, accumulate=4)
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(tensor, weights(parts)[name], rtol=1e-3, atol=1e-5)
