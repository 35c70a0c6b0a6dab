"""From examples to tensors: windows, speeds, masks, what is kept, and computing ahead."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from training_jobs import examples, tiny_model
from transformers import MoonshineConfig

from lors.errors import ConfigError
from lors.speech.architecture import Moonshine, Whisper
from lors.speech.features import log_mel, pad_mels
from lors.training.augment import change_speed, spec_augment, speed_of
from lors.training.batches import Draw
from lors.training.inputs import Inputs, ahead
from lors.training.settings import Augment, SpecAugment

CONFIG = tiny_model().config
MEAN_MASKS = SpecAugment(time_seconds=0.2)


def inputs(**options: Any) -> Inputs:
    return Inputs(examples(), Whisper(), CONFIG, "auto", **options)


def everything(epoch: int = 0) -> list[Draw]:
    return [Draw(index, epoch) for index in range(12)]


def heard(found: Inputs, draws: list[Draw], **options: Any) -> torch.Tensor:
    (part,) = found.batch(draws, **options).parts
    return part.inputs["input_features"]


def test_a_batch_in_the_window_of_its_longest() -> None:
    batch = inputs().batch(everything()[:5])
    mels = log_mel([example.utterance.audio() for example in examples()[:5]], 80)
    assert batch.window == 1.5  # the longest lasts 0.84 s: 0.3 s more, to the half second, at least 1 s
    (part,) = batch.parts
    assert torch.equal(part.inputs["input_features"], pad_mels(mels, 150))
    assert part.inputs["decoder_input_ids"].shape == part.labels.shape
    assert (batch.samples, batch.tokens) == (5, sum(len(example.labels) for example in examples()[:5]))


@pytest.mark.parametrize(("parts", "processes"), [(2, 1), (7, 1), (20, 1), (1, 2), (3, 2), (20, 3), (1, 20)])
def test_parts_are_the_batch(parts: int, processes: int) -> None:
    found, whole = inputs(), inputs().batch(everything())
    shares = [found.batch(everything(), parts, number, processes) for number in range(processes)]
    assert {(s.window, s.tokens, s.samples) for s in shares} == {(whole.window, whole.tokens, whole.samples)}
    assert all(1 <= len(own.parts) <= parts for own in shares)
    real = [part for own in shares for part in own.parts if part.weight == 1]
    assert torch.equal(torch.cat([p.inputs["input_features"] for p in real]), whole.parts[0].inputs["input_features"])
    assert sum(int((part.labels != -100).sum()) for part in real) == whole.tokens
    idle = [own for own in shares if own.parts[0].weight == 0]
    assert len(idle) == max(0, processes - 12)
    assert all(len(own.parts) == 1 and len(own.parts[0].labels) == 1 for own in idle)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 100])
@pytest.mark.parametrize("architecture", [Whisper(), Moonshine()])
def test_a_split_batch_is_the_batch(architecture: Any, count: int) -> None:
    whole = Inputs(examples(), architecture, CONFIG, "auto").batch(everything(), 2)
    split = whole.split(count)
    assert (split.window, split.tokens, split.samples) == (whole.window, whole.tokens, whole.samples)
    sizes = [len(part.labels) for part in split.parts]
    assert (len(sizes), min(sizes) > 0, max(sizes)) == (2 * min(count, 6), True, -(-6 // count))
    assert torch.equal(*(torch.cat([part.labels for part in batch.parts]) for batch in (whole, split)))
    for name in whole.parts[0].inputs:
        assert torch.equal(*(torch.cat([part.inputs[name] for part in batch.parts]) for batch in (whole, split))), name


def test_a_speed_decides_the_window_and_is_drawn_by_seed_epoch_and_id() -> None:
    augment = Augment(speed=(0.5, 1.0, 2.0))
    found = inputs(augment=augment, seed=7)
    for epoch, index in itertools.product(range(3), range(12)):
        utterance = examples()[index].utterance
        speed = speed_of(augment.speed, f"7-{epoch}-u{index}")
        if utterance.seconds / speed > 2.0:
            speed = 1.0  # slowed down, it would not fit the base's 2 s
        batch = found.batch([Draw(index, epoch)])
        assert batch.window == Whisper().window_for(CONFIG, utterance.seconds / speed, "auto")
        mels = log_mel([change_speed(utterance.audio(), speed)], 80)
        assert torch.equal(batch.parts[0].inputs["input_features"], pad_mels(mels, round(batch.window * 100)))
    # All three were there, each under its own name: a second time gives the same from what is kept.
    again = [heard(found, [Draw(3, epoch)]) for epoch in range(9)]
    assert len({tensor.shape for tensor in again}) == 3
    fresh = inputs(augment=augment, seed=7)
    assert all(torch.equal(a, heard(fresh, [Draw(3, epoch)])) for epoch, a in enumerate(again))


def test_batches_are_bounded_by_the_changed_length() -> None:
    found = inputs(augment=Augment(speed=(0.5,)))
    for drawn in itertools.islice(found.forever(6.0, 1.0), 40):
        batch = found.batch(drawn)
        assert len(drawn) * batch.window <= 6.0


def test_masks_are_drawn_anew_each_epoch_and_leave_what_is_kept() -> None:
    found = inputs(augment=Augment(spec_augment=MEAN_MASKS), seed=1)
    utterances = [example.utterance for example in examples()]
    for epoch in (0, 1, 0):
        mels = log_mel([u.audio() for u in utterances], 80)
        masked = [spec_augment(m, MEAN_MASKS, f"1-{epoch}-{u.id}") for m, u in zip(mels, utterances, strict=True)]
        assert torch.equal(heard(found, everything(epoch)), pad_mels(masked, 200))
    assert not torch.equal(heard(found, everything(0)), heard(found, everything(1)))
    assert not torch.equal(heard(found, everything(0)), heard(inputs(), everything(0)))


def test_an_utterance_does_not_depend_on_its_batch() -> None:
    augment = Augment(speed=(0.9, 1.1), spec_augment=MEAN_MASKS)
    whole = heard(inputs(augment=augment), everything())
    parts = inputs(augment=augment).batch(everything(), parts=5).parts
    assert torch.equal(torch.cat([part.inputs["input_features"] for part in parts]), whole)


def test_masks_need_a_spectrogram() -> None:
    with pytest.raises(ConfigError, match=r"spec_augment masks spectrograms, and a moonshine base hears raw audio"):
        Inputs(examples(), Moonshine(), MoonshineConfig(), "auto", augment=Augment(spec_augment=SpecAugment()))


def test_order_depends_on_the_seed_alone() -> None:
    def taken(seed: int) -> list[list[Draw]]:
        return list(itertools.islice(inputs(seed=seed).forever(8.0, 1.0), 30))

    assert taken(0) == taken(0) != taken(1)
    long = replace(examples()[0].utterance, seconds=2.5)
    with pytest.raises(ConfigError, match=r"utterance u0 lasts 2.5 s, more than the window of 2 s"):
        Inputs([replace(examples()[0], utterance=long)], Whisper(), CONFIG, "auto")


@pytest.mark.parametrize("count", [0, 1, 3])
def test_ahead(count: int) -> None:
    computed: list[int] = []
    threads = set()

    def compute(number: int) -> int:
        computed.append(number)
        threads.add(threading.current_thread())
        return number * number

    def numbers() -> Iterator[int]:
        yield from range(100)

    found = ahead(numbers(), compute, count)
    assert [next(found) for _ in range(5)] == [0, 1, 4, 9, 16]
    found.close()
    assert computed == list(range(len(computed)))
    assert 5 <= len(computed) <= 5 + count
    assert (threading.current_thread() in threads) == (count == 0)
    assert list(ahead(range(4), compute, count)) == [0, 1, 4, 9]


def test_an_error_ahead_comes_in_its_turn() -> None:
    def compute(number: int) -> float:
        return 1 / (number - 2)

    found = ahead(range(10), compute, 4)
    assert [next(found), next(found)] == [-0.5, -1.0]
    with pytest.raises(ZeroDivisionError):
        next(found)
