"""Bursts of sound, and utterances of them."""

from __future__ import annotations

import numpy as np

from lors.speech.corpus import SAMPLE_RATE, Utterance, encode_flac


def sound(seconds: float, rate: int = SAMPLE_RATE, channels: int = 1, seed: int = 0) -> np.ndarray:
    """A tone that moves plus noise; (samples,) or (samples, channels) float32."""
    rng = np.random.default_rng(seed)
    time = np.arange(round(seconds * rate)) / rate
    wave = 0.3 * np.sin(2 * np.pi * (200 + 40 * seed + 90 * np.sin(3 * time)) * time)
    wave = (wave * (0.5 + 0.5 * np.sin(7 * time)) + 0.01 * rng.standard_normal(len(time))).astype(np.float32)
    return wave if channels == 1 else np.stack([wave * (1 - 0.2 * c) for c in range(channels)], axis=1)


def utterance(number: int, seconds: float, translation: str | None = "hello") -> Utterance:
    audio = sound(seconds, seed=number)
    return Utterance(f"u{number}", f"hola {number}", translation, None, len(audio) / SAMPLE_RATE, encode_flac(audio))
