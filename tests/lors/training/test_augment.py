from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from speech_sounds import sound

from lors.speech.features import log_mel, pad_mels
from lors.training.augment import change_speed, spec_augment, speed_of
from lors.training.settings import SpecAugment

MASKS = st.builds(
    SpecAugment,
    time_masks=st.integers(0, 3),
    time_seconds=st.floats(0.02, 3),
    time_share=st.floats(0.01, 1),
    frequency_masks=st.integers(0, 3),
    frequency_bins=st.integers(1, 90),
)


def spectrogram(bins: int, frames: int) -> torch.Tensor:
    """No value twice, none the mean."""
    torch.manual_seed(bins * 1000 + frames)
    return torch.rand(bins, frames) + torch.arange(bins * frames).view(bins, frames) * 3


def widest(flags: torch.Tensor) -> int:
    """The longest run of True in a vector."""
    return max((len(run) for run in "".join("x" if flag else " " for flag in flags.tolist()).split()), default=0)


@given(MASKS, st.integers(1, 40), st.integers(1, 120), st.text(max_size=9))
def test_only_the_utterances_own_frames_are_masked_with_its_mean(
    settings: SpecAugment, bins: int, frames: int, seed: str
) -> None:
    mel = spectrogram(bins, frames)
    before = mel.clone()
    masked = spec_augment(mel, settings, seed)
    assert torch.equal(mel, before)
    assert masked.data_ptr() != mel.data_ptr()
    assert torch.equal(spec_augment(mel, settings, seed), masked)
    assert torch.equal(masked[:, -1], mel[:, -1])
    changed = masked != mel
    if frames > 1:
        assert bool((masked[changed] == mel[:, :-1].mean()).all())
    columns, rows = changed[:, :-1].all(0), changed[:, :-1].all(1)
    hidden = changed[:, :-1]
    if not rows.all() and not columns.all():
        # Whole columns and whole rows, nothing else.
        assert torch.equal(hidden, columns[None, :] | rows[:, None])
        longest = int(min(settings.time_seconds * 100, settings.time_share * (frames - 1)))
        assert int(columns.sum()) <= settings.time_masks * longest
        assert widest(columns) <= settings.time_masks * longest
        assert int(rows.sum()) <= settings.frequency_masks * min(settings.frequency_bins, bins)


@pytest.mark.parametrize(
    ("settings", "widths"),
    [
        (SpecAugment(time_masks=1, time_seconds=0.1, time_share=1, frequency_masks=0), range(11)),
        (SpecAugment(time_masks=1, time_seconds=5, time_share=0.05, frequency_masks=0), range(6)),
        (SpecAugment(time_masks=0, frequency_masks=1, frequency_bins=4), range(5)),
    ],
)
def test_masks_are_of_all_widths_from_none_to_the_longest_at_all_places(settings: SpecAugment, widths: range) -> None:
    mel = spectrogram(20, 101)
    seen, places = Counter[int](), torch.zeros(20, 101)
    for number in range(2000):
        changed = spec_augment(mel, settings, f"0-0-{number}") != mel
        seen[int(changed.any(0).sum() if settings.time_masks else changed.any(1).sum())] += 1
        places += changed
    assert sorted(seen) == list(widths)
    assert max(seen.values()) < 1.5 * min(seen.values())
    assert bool((places[:, :-1] > 0).all())


def test_masks_differ_by_seed_and_masks_of_the_padding_are_none() -> None:
    mel = log_mel([sound(2.0)], 80)[0]
    settings = SpecAugment()
    masked = [spec_augment(mel, settings, f"{seed}-{epoch}-u1") for seed in (0, 1) for epoch in (0, 1)]
    assert len({tensor.numpy().tobytes() for tensor in masked}) == 4
    for one, padded in zip(masked, pad_mels(masked, 300), strict=True):
        assert torch.equal(padded[:, mel.shape[1] :], pad_mels([mel], 300)[0][:, mel.shape[1] :])
        assert 0 < int((one != mel).sum()) < 0.9 * mel.numel()


def test_silence_of_no_length_has_nothing_to_mask() -> None:
    mel = torch.full((80, 1), -1.5)
    assert torch.equal(spec_augment(mel, SpecAugment(), "0-0-u"), mel)


@given(st.lists(st.floats(0.5, 2), min_size=1, max_size=5, unique=True), st.text(max_size=9))
def test_a_speed_is_one_of_those_and_the_same_for_the_same_seed(speeds: list[float], seed: str) -> None:
    assert speed_of(speeds, seed) in speeds
    assert speed_of(tuple(speeds), seed) == speed_of(speeds, seed)


def test_speeds_come_as_often_as_each_other() -> None:
    counts = Counter(speed_of((0.9, 1.0, 1.1), f"0-{epoch}-u{n}") for epoch in range(3) for n in range(1000))
    assert set(counts) == {0.9, 1.0, 1.1}
    assert min(counts.values()) > 900
    assert speed_of((), "0-0-u") == 1.0


@given(st.integers(0, 20_000), st.floats(0.5, 2))
def test_faster_speech_is_shorter(samples: int, speed: float) -> None:
    audio = sound(samples / 16_000)
    before = audio.copy()
    changed = change_speed(audio, speed)
    assert np.array_equal(audio, before)
    assert changed.dtype == np.float32
    assert abs(len(changed) - samples / speed) <= 1
    if speed == 1:
        assert changed is audio


@pytest.mark.parametrize("speed", [0.9, 1.1, 1.5])
def test_speed_moves_the_pitch(speed: float) -> None:
    """A tone of 440 Hz becomes the tone of 440 Hz times the speed, as loud."""
    audio = np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000).astype(np.float32)
    changed = change_speed(audio, speed)
    expected = np.sin(2 * np.pi * 440 * speed * np.arange(len(changed)) / 16_000)
    assert np.abs(changed - expected)[200:-200].max() < 1e-3
    assert change_speed(audio, 1.0) is audio
    assert math.isclose(len(changed), 16_000 / speed, abs_tol=1)
