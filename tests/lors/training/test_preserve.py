"""Held to the base under other prompts: which ones, how far the model is from it, and what that does to a training."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import kl_div
from training_jobs import (
    InterruptedTrainingError,
    OtherPrompts,
    OtherSpeech,
    assert_same,
    examples,
    interrupt_at,
    settings,
    tiny_model,
    weights,
)

from lors.errors import ConfigError, InputError
from lors.speech.architecture import Whisper
from lors.speech.corpus import Utterance
from lors.starter import MODEL_FOLDER
from lors.training import finetune, update
from lors.training.batches import Draw
from lors.training.distributed import team
from lors.training.examples import Example
from lors.training.finetune import fine_tune
from lors.training.inputs import Inputs
from lors.training.loss import divergence
from lors.training.preserve import Base, Prompts
from lors.training.weights import trained

PRESERVE = {"weight": 0.5}


# Which prompts


@cache
def tokenizer() -> Any:
    from transformers import WhisperTokenizerFast

    return WhisperTokenizerFast.from_pretrained(MODEL_FOLDER)


def prompts(trained: list[tuple[str, str]], languages: tuple[str, ...] = ("de", "es"), limit: int = 100) -> Prompts:
    return Prompts(tokenizer(), Whisper(), limit, trained, languages)


def spoken(task: str = "transcribe", translation: str | None = "two") -> Example:
    utterance = replace(examples(1)[0].utterance, text="zwei", translation=translation)
    return Example(utterance, (1, 2), f"de-{task}")


def asked(found: Prompts, example: Example, count: int = 400) -> Counter[str]:
    return Counter(tokenizer().decode(found.labels(example, str(seed))) for seed in range(count))


def test_half_of_the_draws_are_the_other_task_and_none_is_trained() -> None:
    drawn = asked(prompts([("de", "transcribe")]), spoken())
    assert set(drawn) == {
        "<|de|><|translate|><|notimestamps|> two<|endoftext|>",
        "<|es|><|transcribe|><|notimestamps|> zwei<|endoftext|>",
        "<|es|><|translate|><|notimestamps|> two<|endoftext|>",
    }
    # A half, and a third of the other half.
    assert 220 < drawn["<|de|><|translate|><|notimestamps|> two<|endoftext|>"] < 310


def test_of_a_language_that_is_trained_on_all_tasks_only_other_languages_are_drawn() -> None:
    drawn = asked(prompts([("de", "transcribe"), ("de", "translate")]), spoken("translate"))
    assert set(drawn) == {
        "<|es|><|transcribe|><|notimestamps|> zwei<|endoftext|>",
        "<|es|><|translate|><|notimestamps|> two<|endoftext|>",
    }


def test_without_a_translation_the_text_is_the_one_that_is_trained() -> None:
    drawn = asked(prompts([("de", "transcribe")]), spoken(translation=None))
    assert "<|de|><|translate|><|notimestamps|> zwei<|endoftext|>" in drawn


def test_without_a_list_all_languages_of_the_base_are_drawn() -> None:
    found = prompts([("de", "transcribe"), ("de", "translate")], ())
    assert len({text.split("|>")[0] for text in asked(found, spoken(), 2000)}) > 90


def test_the_labels_fit_the_decoder_and_are_the_same_for_the_same_seed() -> None:
    found = prompts([("de", "transcribe")], limit=5)
    assert {len(found.labels(spoken(), str(seed))) for seed in range(20)} == {5}
    assert found.labels(spoken(), "0-0-a") == found.labels(spoken(), "0-0-a")


def test_what_cannot_be_asked_for() -> None:
    with pytest.raises(ConfigError, match="the base has no language 'xx'"):
        prompts([("de", "transcribe")], ("xx",))
    with pytest.raises(ConfigError, match="all prompts of these languages are trained on, list more"):
        prompts([("de", "transcribe"), ("de", "translate")], ("de",))
    with pytest.raises(ConfigError, match="takes one alone: leave it out"):
        Prompts(tokenizer(), Whisper(english_only=True), 100, [("en", "transcribe")])
    with pytest.raises(InputError, match="is no language and task"):
        prompts([("de", "transcribe")]).labels(examples(1)[0], "0")


# Speech of other languages


def lasting(seconds: float, number: int, translation: str | None = "two") -> Utterance:
    known = examples(1)[0].utterance
    return replace(known, id=f"fr/{number}", text="deux", translation=translation, seconds=seconds)


def sounding(number: int) -> Utterance:
    return replace(examples()[number].utterance, id=f"fr/{number}", text="deux")


def with_speech(*utterances: Utterance) -> Prompts:
    return Prompts(tokenizer(), Whisper(), 100, [("de", "transcribe")], ("de", "es"), {"fr": utterances})


def test_half_of_the_draws_are_speech_of_other_languages_with_its_own_prompts() -> None:
    found = [with_speech(lasting(1.0, 0), lasting(2.0, 1)).elsewhere(str(seed), 2.0) for seed in range(400)]
    there = [one for one in found if one is not None]
    assert 160 < len(there) < 240
    assert {tokenizer().decode(labels) for _, labels in there} == {
        "<|fr|><|transcribe|><|notimestamps|> deux<|endoftext|>",
        "<|fr|><|translate|><|notimestamps|> two<|endoftext|>",
    }
    assert {utterance.id for utterance, _ in there} == {"fr/0", "fr/1"}


def test_no_longer_speech_than_the_batch_has_is_drawn() -> None:
    found = with_speech(lasting(1.0, 0), lasting(2.0, 1))
    drawn = [found.elsewhere(str(seed), 1.5) for seed in range(100)]
    assert {one[0].id for one in drawn if one is not None} == {"fr/0"}
    assert {found.elsewhere(str(seed), 0.5) for seed in range(100)} == {None}
    assert {prompts([("de", "transcribe")]).elsewhere(str(seed), 9.0) for seed in range(100)} == {None}


def test_speech_without_a_translation_has_its_text_in_place_of_it() -> None:
    found = [with_speech(lasting(1.0, 0, None)).elsewhere(str(seed), 2.0) for seed in range(50)]
    said = {tokenizer().decode(one[1]) for one in found if one is not None}
    assert "<|fr|><|translate|><|notimestamps|> deux<|endoftext|>" in said


@given(st.permutations([lasting(0.5 * number, number) for number in range(1, 6)]), st.integers(0, 50))
def test_the_order_of_the_speech_does_not_count(order: list[Utterance], seed: int) -> None:
    expected = with_speech(*(lasting(0.5 * number, number) for number in range(1, 6)))
    assert with_speech(*order).elsewhere(str(seed), 2.2) == expected.elsewhere(str(seed), 2.2)


# How far the model is from the base


@given(st.integers(1, 4), st.integers(1, 40), st.integers(2, 30), st.integers(0, 1000))
def test_divergence_and_gradient_are_those_of_torch(b: int, t: int, v: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = (5 * torch.randn(b, t, v, generator=generator)).requires_grad_()
    wanted = 5 * torch.randn(b, t, v, generator=generator)
    labels = torch.randint(0, v, (b, t), generator=generator)
    labels[torch.rand(b, t, generator=generator) < 0.3] = -100
    each = kl_div(logits.log_softmax(-1), wanted.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    expected = each[labels != -100].sum()
    (gradient,) = torch.autograd.grad(3 * expected, logits)
    found = divergence(logits * 1.0, wanted, labels)  # a copy: it overwrites what it is given
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-4, abs=1e-4)
    assert float(found.detach()) >= -1e-4
    (own,) = torch.autograd.grad(3 * found, logits)
    assert torch.allclose(own, gradient, rtol=1e-4, atol=1e-5)


def test_equal_logits_do_not_diverge() -> None:
    logits = torch.randn(2, 3, 50, requires_grad=True)
    found = divergence(logits * 1.0, logits.detach(), torch.zeros(2, 3, dtype=torch.long))
    assert float(found.detach()) == pytest.approx(0, abs=1e-5)
    (gradient,) = torch.autograd.grad(found, logits)
    assert gradient.abs().max() < 1e-6


def batch(parts: int = 1, asked: Any = OtherPrompts) -> Any:
    found = Inputs(examples(), Whisper(), tiny_model().config, "auto", prompts=asked())
    return found.batch([Draw(index, 0) for index in range(12)], parts)


def gradient(parts: int, base: Any, asked: Any = OtherPrompts) -> tuple[float, dict[str, torch.Tensor]]:
    model = tiny_model(**OTHER_WEIGHTS)
    with trained(model, (), None, 0) as parameters:
        state = finetune._start(model, parameters, settings(), 1e-3, torch.float32)
        us = team(model.device)
        own = batch(parts, asked)
        loss = update.gradient(model.train(), model, own, state, 0.0, torch.float32, us, Base(base, 0.5))
        return loss, {name: p.grad for name, p in parameters.items() if p.grad is not None}


OTHER_WEIGHTS = {"init_std": 0.1}


@pytest.mark.parametrize("asked", [OtherPrompts, OtherSpeech])
@pytest.mark.parametrize("parts", [1, 5])
def test_the_gradient_is_that_of_both_losses_a_token(parts: int, asked: Any) -> None:
    base, other = tiny_model(), tiny_model(**OTHER_WEIGHTS).train()
    loss, found = gradient(parts, base, asked)
    assert all(parameter.grad is None for parameter in base.parameters())
    (part,) = batch(1, asked).parts
    own = other(**part.inputs).logits
    heard = part.inputs["input_features"] if asked is OtherPrompts else part.others.heard["input_features"]
    written, wanted = (model(heard, decoder_input_ids=part.others.decoder_input_ids).logits for model in (other, base))
    kept = part.others.labels != -100
    far = kl_div(written[kept].log_softmax(-1), wanted[kept].log_softmax(-1), reduction="sum", log_target=True)
    said = torch.nn.functional.cross_entropy(own.flatten(0, 1), part.labels.flatten(), reduction="sum")
    expected = (said + 0.5 * far) / batch().tokens
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-4)
    for name, parameter in other.named_parameters():
        if name in found:
            assert torch.allclose(found[name], parameter.grad, rtol=1e-3, atol=1e-6), name


def test_what_is_heard_beside_is_the_same_speech_or_that_of_another_language() -> None:
    (part,) = batch(1, OtherSpeech).parts
    own, heard = part.inputs["input_features"], part.others.heard["input_features"]
    assert own.shape == heard.shape
    assert [bool(torch.equal(a, b)) for a, b in zip(own, heard, strict=True)] == [False, True] * 6
    assert batch().parts[0].others.heard is None
    pieces = part.split(5)
    assert torch.equal(torch.cat([piece.others.heard["input_features"] for piece in pieces]), heard)


@pytest.mark.parametrize(("parts", "processes"), [(3, 1), (1, 3), (2, 2)])
def test_what_is_heard_beside_does_not_depend_on_the_parts_and_processes(parts: int, processes: int) -> None:
    own = [replace(example, group="de-transcribe") for example in examples()]
    found = Inputs(own, Whisper(), tiny_model().config, "auto", prompts=with_speech(*map(sounding, range(12))))
    draws = [Draw(index, 0) for index in range(12)]
    (whole,) = found.batch(draws).parts
    shares = [part for k in range(processes) for part in found.batch(draws, parts, k, processes).parts]
    heard = [part.inputs if part.others.heard is None else part.others.heard for part in shares]
    assert torch.equal(torch.cat([one["input_features"] for one in heard]), whole.others.heard["input_features"])


# A training


def distance(model: Any, base: Any) -> float:
    """From the base under the other prompts, a token."""
    (part,) = batch().parts
    ask = {"input_features": part.inputs["input_features"], "decoder_input_ids": part.others.decoder_input_ids}
    with torch.no_grad():
        far = divergence(model(**ask).logits, base(**ask).logits, part.others.labels)
    return float(far) / int((part.others.labels != -100).sum())


def run(work: Path, report: Any = lambda event: None, asked: Any = OtherPrompts, **changes: Any) -> Any:
    model = tiny_model()
    fine_tune(model, examples(), [], settings(**changes), work, report, prompts=asked())
    return model


def test_the_model_stays_nearer_to_the_base_under_other_prompts(tmp_path: Path) -> None:
    free, held = run(tmp_path / "a", steps=40), run(tmp_path / "b", steps=40, preserve={"weight": 5})
    assert 0 < distance(held, tiny_model()) < distance(free, tiny_model()) / 3


def test_what_does_not_preserve_is_trained_as_before(tmp_path: Path) -> None:
    plain = tiny_model()
    fine_tune(plain, examples(), [], settings(), tmp_path / "a")
    assert_same(weights(run(tmp_path / "b")), weights(plain))


@pytest.mark.usefixtures("often")
def test_a_resumed_training_is_held_to_the_base_and_not_to_itself(tmp_path: Path) -> None:
    whole = run(tmp_path / "a", preserve=PRESERVE, augment={"speed": [0.9, 1.1]})
    with pytest.raises(InterruptedTrainingError):
        run(tmp_path / "b", interrupt_at(7), preserve=PRESERVE, augment={"speed": [0.9, 1.1]})
    assert_same(weights(run(tmp_path / "b", preserve=PRESERVE, augment={"speed": [0.9, 1.1]})), weights(whole))


@pytest.mark.parametrize("asked", [OtherPrompts, OtherSpeech])
def test_a_frozen_encoder_is_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: Any) -> None:
    """To the same weights as with an encoder of the base's own."""
    seen = []
    base = finetune._base

    def counted(*arguments: Any) -> Any:
        found = base(*arguments)
        assert found is not None
        found.model.get_encoder().register_forward_hook(lambda *_: seen.append(1))
        return found

    monkeypatch.setattr(finetune, "_base", counted)
    once = run(tmp_path / "a", asked=asked, preserve=PRESERVE, freeze=["encoder"])
    assert not seen
    monkeypatch.setattr(finetune, "in_group", lambda *_: True)
    twice = run(tmp_path / "b", asked=asked, preserve=PRESERVE, freeze=["encoder"])
    assert len(seen) == 12
    assert_same(weights(once), weights(twice))


def test_it_may_be_held_to_another_model_than_it_starts_from(tmp_path: Path) -> None:
    other, model = tiny_model(**OTHER_WEIGHTS), tiny_model()
    before = distance(model, other)
    own = settings(steps=40, preserve={"weight": 20}, freeze=["encoder"])
    fine_tune(model, examples(), [], own, tmp_path, prompts=OtherPrompts(), held_to=other)
    assert distance(model, other) < before / 2
    assert_same(weights(other), weights(tiny_model(**OTHER_WEIGHTS)))


@pytest.mark.parametrize("same", [True, False])
def test_a_frozen_encoder_serves_both_only_where_it_is_the_same(
    same: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    base = update.part_loss

    def noted(*arguments: Any) -> Any:
        seen.append(arguments[-1].shares_encoder)
        return base(*arguments)

    monkeypatch.setattr(update, "part_loss", noted)
    other = tiny_model() if same else tiny_model(**OTHER_WEIGHTS)
    own = settings(steps=2, preserve=PRESERVE, freeze=["encoder"])
    fine_tune(tiny_model(), examples(), [], own, tmp_path, prompts=OtherPrompts(), held_to=other)
    assert set(seen) == {same}


def test_it_needs_prompts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing says here which other prompts there are"):
        fine_tune(tiny_model(), examples(), [], settings(preserve={}), tmp_path)


def test_the_identity_of_a_training_from_before_is_kept() -> None:
    plain = settings().identity()
    assert not {"preserve", "tasks"} & plain.keys()
    assert settings(tasks="together").identity() == plain  # its parts say that
    held = {"weight": 1.0, "languages": []}
    assert settings(preserve={}).identity() == plain | {"preserve": held}
    with_speech = {"preserve": {**held, "speech": ["it"], "utterances": 500}}
    assert settings(preserve={"speech": ["it"]}).identity() == plain | with_speech
    assert "start" not in settings(validation={"every": 1}).identity()["validation"]
    assert settings(validation={"every": 1, "start": True}).identity()["validation"]["start"]
