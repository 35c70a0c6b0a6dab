"""Changes to the training speech. What an utterance gets depends on its seed alone, a string such as
`0-EPOCH-UTTERANCE`: not on its batch, nor on the number of processes."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import soxr
from torch import Tensor

from lors.speech.corpus import SAMPLE_RATE
from lors.speech.features import FRAMES_PER_SECOND
from lors.training.settings import SpecAugment

__all__ = ["change_speed", "spec_augment", "speed_of"]


def speed_of(speeds: Sequence[float], seed: str) -> float:
    """One of `speeds`, each as likely; 1.0 where there are none."""
    return random.Random(f"speed {seed}").choice(speeds) if speeds else 1.0


def change_speed(
    audio: np.ndarray,  # (N,) float32 at 16 kHz
    speed: float,  # 1.1 is a tenth faster
) -> np.ndarray:
    """Speed perturbation (Ko et al. 2015, section 2.2): (round(N / speed),) samples; tempo and pitch change together.

    1.0 returns `audio` itself.
    """
    if speed == 1.0:
        return audio
    changed: np.ndarray = soxr.resample(audio, SAMPLE_RATE * speed, SAMPLE_RATE)
    return changed


def spec_augment(
    mel: Tensor,  # (M, F) log-mels of `lors.speech.features.log_mel`, whose last frame is the silence of the padding
    settings: SpecAugment,
    seed: str,
) -> Tensor:
    """A copy with masks over time and frequency (Park et al. 2019, section 2), set to the utterance's mean.

    Positions and widths are uniform. The last frame stays as it is: padding repeats it.
    """
    out = mel.clone()
    own = out[:, :-1]
    bins, frames = own.shape
    if frames == 0:
        return out
    draw = random.Random(f"spec_augment {seed}")
    mean = own.mean()
    longest = int(min(settings.time_seconds * FRAMES_PER_SECOND, settings.time_share * frames))
    for _ in range(settings.time_masks):
        width = draw.randint(0, longest)
        start = draw.randint(0, frames - width)
        own[:, start : start + width] = mean
    for _ in range(settings.frequency_masks):
        width = draw.randint(0, min(settings.frequency_bins, bins))
        start = draw.randint(0, bins - width)
        own[start : start + width] = mean
    return out
