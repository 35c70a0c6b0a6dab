"""Log-mel features against transformers' extractor, and encoder windows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from speech_sounds import sound
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

from lors.speech.features import log_mel, native_window, pad_mels, window_for, windowed

RATE = 16_000
EXTRACTORS = {
    (chunk, mels): WhisperFeatureExtractor(feature_size=mels, chunk_length=chunk)
    for chunk in (4, 30)
    for mels in (80, 128)
}


def extracted(audio: np.ndarray, chunk: int, mels: int) -> torch.Tensor:  # (M, F)
    return EXTRACTORS[chunk, mels](audio, sampling_rate=RATE, return_tensors="pt").input_features[0]


def ours(audio: np.ndarray, chunk: int, mels: int) -> torch.Tensor:
    return pad_mels(log_mel([audio], mels), chunk * 100)[0]


@pytest.mark.parametrize("mels", [80, 128])
@pytest.mark.parametrize("chunk", [4, 30])
@settings(max_examples=12, deadline=None)
@given(length=st.integers(0, 4 * RATE - 41), seed=st.integers(0, 99), level=st.sampled_from([1.0, 1e-2, 1e-5]))
def test_equals_the_extractor(chunk: int, mels: int, length: int, seed: int, level: float) -> None:
    audio = (level * np.random.default_rng(seed).standard_normal(length)).astype(np.float32)
    torch.testing.assert_close(ours(audio, chunk, mels), extracted(audio, chunk, mels), rtol=0, atol=1e-6)


@pytest.mark.parametrize("mels", [80, 128])
@pytest.mark.parametrize("chunk", [4, 30])
def test_audio_of_the_whole_window(chunk: int, mels: int) -> None:
    """The last frame alone differs: the extractor mirrors the audio after its end."""
    audio = sound(chunk)
    a, b = ours(audio, chunk, mels), extracted(audio, chunk, mels)
    torch.testing.assert_close(a[:, :-1], b[:, :-1], rtol=0, atol=1e-6)
    torch.testing.assert_close(a[:, -1], b[:, -1], rtol=0, atol=0.5)
    just_inside = audio[: chunk * RATE - 41]
    torch.testing.assert_close(ours(just_inside, chunk, mels), extracted(just_inside, chunk, mels), rtol=0, atol=1e-6)


@pytest.mark.parametrize("seconds", [0.0, 1.0, 3.9])
def test_silence(seconds: float) -> None:
    audio = np.zeros(int(seconds * RATE), dtype=np.float32)
    assert torch.equal(ours(audio, 4, 80), extracted(audio, 4, 80))
    assert torch.equal(ours(audio, 4, 80), torch.full((80, 400), -1.5))


def test_does_not_depend_on_the_batch() -> None:
    audios = [sound(seconds, seed=seed) for seed, seconds in enumerate((0.2, 3.1, 1.0, 0.01))]
    for alone, together in zip((log_mel([a], 80)[0] for a in audios), log_mel(audios, 80), strict=True):
        assert alone.shape == together.shape
        torch.testing.assert_close(alone, together, rtol=0, atol=1e-6)
    assert log_mel([], 80) == []


def test_ends_in_one_frame_of_silence() -> None:
    for seconds in (0.0, 0.5, 1.234):
        audio = sound(seconds)
        mel = log_mel([audio], 80)[0]
        assert mel.shape[1] * 160 < len(audio) + 600
        assert torch.equal(mel[:, -1], mel[:, -1].min().expand(80))
        assert pad_mels([mel], 3)[0].shape == (80, 3)


@given(
    longest=st.floats(0.01, 30),
    native=st.sampled_from([30.0, 4.0, 10.0]),
    setting=st.sampled_from(["auto", "tight", 3.0, 40.0]),
)
def test_window_rule(longest: float, native: float, setting: str | float) -> None:
    longest = min(longest, native)
    window = window_for(longest, native, setting)
    assert 0 < window <= native
    if not isinstance(setting, str):
        assert window == min(setting, native)
        return
    assert window >= longest
    assert window == native or (window * 2).is_integer()
    if native == 30:
        margin, least = (2, 7) if setting == "auto" else (1, 5)
        assert window >= min(30, max(least, longest + margin))
        assert window <= max(least, longest + margin + 0.5)
    else:
        assert window <= max(1, longest + 0.8)
    assert window_for(min(native, longest + 1), native, setting) >= window


def test_window_of_a_pretrained_base() -> None:
    assert [window_for(seconds, 30.0) for seconds in (1, 5, 5.1, 27.6, 30)] == [7, 7, 7.5, 30, 30]
    assert [window_for(seconds, 30.0, "tight") for seconds in (1, 4, 4.1, 28.6, 30)] == [5, 5, 5.5, 30, 30]
    for setting in ("auto", "tight"):
        assert [window_for(seconds, 4.0, setting) for seconds in (0.2, 1.2, 1.21, 3.8)] == [1, 1.5, 2, 4]


def tiny(positions: int, **options: int) -> WhisperForConditionalGeneration:
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=30, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_target_positions=20,
        max_source_positions=positions, pad_token_id=0, bos_token_id=0, eos_token_id=0, decoder_start_token_id=1,
    )  # fmt: skip
    return WhisperForConditionalGeneration(config).eval()


def test_windowed_equals_a_model_built_for_that_window() -> None:
    model, small = tiny(1500), tiny(100)
    weights = model.state_dict()
    sinusoids = small.model.encoder.embed_positions.weight.clone()
    name = "model.encoder.embed_positions.weight"
    small.load_state_dict({**weights, name: weights[name][:100]})
    assert torch.equal(small.model.encoder.embed_positions.weight[:, 0], weights[name][:100, 0])
    assert sinusoids.shape == (100, 16)
    mel = pad_mels(log_mel([sound(1.3)], 80), 200)
    labels = torch.tensor([[3, 4, 0]])
    with torch.no_grad():
        expected = small(input_features=mel, labels=labels)
        with windowed(model, 2.0) as frames:
            assert frames == 200
            found = model(input_features=mel, labels=labels)
    assert torch.equal(found.encoder_last_hidden_state, expected.encoder_last_hidden_state)
    assert torch.equal(found.logits, expected.logits)


@pytest.mark.parametrize("fails", [False, True])
def test_windowed_puts_all_positions_back(fails: bool) -> None:
    model = tiny(200)
    before = model.model.encoder.embed_positions
    keys = list(model.state_dict())
    try:
        with windowed(model, 1.5):
            assert model.config.max_source_positions == 75
            assert model.model.encoder.embed_positions.weight.shape == (75, 16)
            assert not model.model.encoder.embed_positions.weight.requires_grad
            assert fails is False or 1 / 0
    except ZeroDivisionError:
        assert fails
    assert model.model.encoder.embed_positions is before
    assert model.config.max_source_positions == model.model.encoder.max_source_positions == 200
    assert list(model.state_dict()) == keys
    assert native_window(model.config) == 4.0


def test_windowed_leaves_a_window_that_is_no_shorter() -> None:
    model = tiny(200)
    before = model.model.encoder.embed_positions
    with windowed(model, 10.0) as frames:
        assert frames == 400
        assert model.model.encoder.embed_positions is before
