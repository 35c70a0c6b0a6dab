from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from speech_sounds import utterance

from lors.errors import CheckpointError, InputError
from lors.scoring.robustness import loops
from lors.speech.architecture import FeatureCache, Whisper
from lors.speech.corpus import Utterance
from lors.speech.features import log_mel, pad_mels, windowed
from lors.speech.load import load_model
from lors.speech.transcribe import TASKS, hypothesis_table, token_limit, transcribe
from lors.starter import MODEL_FOLDER

UTTERANCES = [utterance(number, seconds) for number, seconds in enumerate((1.2, 0.6, 2.4, 0.9, 11.0, 1.7))]


@pytest.fixture(scope="module")
def whisper(whisper_folder: Path) -> tuple[Any, Any]:
    return load_model(whisper_folder)


def test_every_hypothesis_equals_whispers_own_generate_from_the_audio(whisper: tuple[Any, Any]) -> None:
    model, processor = whisper
    found = transcribe(model, processor, UTTERANCES, language="es", batch_seconds=16)
    assert [(h.task, h.id) for h in found] == [(task, u.id) for task in TASKS for u in UTTERANCES]
    assert {h.truncated for h in found} == {True, False}
    assert len({h.text for h in found}) > 6
    for hypothesis, source in zip(found, UTTERANCES * 2, strict=True):
        limit = token_limit(source.seconds, 124)
        with torch.inference_mode(), windowed(model, hypothesis.window) as frames:
            features = pad_mels(log_mel([source.audio()], 80), frames)
            written = model.generate(features, language="es", task=hypothesis.task, max_new_tokens=limit)[0].tolist()
        tokens = [token for token in written if token != model.generation_config.eos_token_id]
        assert hypothesis.text == processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        assert (hypothesis.tokens, hypothesis.truncated) == (len(tokens), len(tokens) == limit)


def test_one_encoder_pass_for_both_tasks_gives_the_tokens_of_two(whisper: tuple[Any, Any]) -> None:
    model, processor = whisper
    passes: list[int] = []
    hook = model.get_encoder().register_forward_hook(lambda *_: passes.append(1))
    for beams in (1, 3):
        both = transcribe(model, processor, UTTERANCES[:4], language="fr", beams=beams)
        shared = len(passes)
        apart = [
            h
            for t in TASKS
            for h in transcribe(model, processor, UTTERANCES[:4], language="fr", tasks=[t], beams=beams)
        ]
        assert both == apart
        assert len(passes) == 3 * shared
        passes.clear()
    hook.remove()
    assert [h.text for h in both[:4]] != [h.text for h in both[4:]]


def test_language_beams_and_window_reach_the_model(whisper: tuple[Any, Any]) -> None:
    model, processor = whisper

    def texts(**settings: Any) -> list[str]:
        return [h.text for h in transcribe(model, processor, UTTERANCES, **{"language": "es"} | settings)]

    assert texts() == texts()
    for other in ({"language": "fr"}, {"beams": 4}, {"window": 12.0}):
        assert texts(**other) != texts()


def test_batches_hold_the_padded_seconds_and_the_longest_come_first(whisper: tuple[Any, Any]) -> None:
    model, processor = whisper
    shapes: list[tuple[int, int]] = []
    hook = model.get_encoder().register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape[::2])))
    done: list[tuple[int, int]] = []
    found = transcribe(
        model,
        processor,
        UTTERANCES,
        language="es",
        tasks=["transcribe"],
        batch_seconds=14,
        on_progress=lambda *state: done.append(state),
    )
    hook.remove()
    # 11 s is alone in its window of 13 s (the others would fit 7 s); two windows of 7 s make 14 s.
    assert shapes == [(1, 1300), (2, 700), (2, 700), (1, 700)]
    assert done == [(1, 6), (3, 6), (5, 6), (6, 6)]
    assert {h.id: h.window for h in found} == {u.id: 13.0 if u.seconds > 7 else 7.0 for u in UTTERANCES}


def test_the_model_is_left_as_it_was(whisper: tuple[Any, Any]) -> None:
    model, processor = whisper
    model.train()
    before = model.generation_config.to_dict()
    transcribe(model, processor, UTTERANCES[:1], language="es", device="cpu")
    assert model.training
    assert model.generation_config.to_dict() == before
    assert model.config.max_source_positions == 1500
    assert model.get_encoder().embed_positions.weight.shape[0] == 1500
    model.eval()


def test_cached_spectrograms_change_nothing(whisper: tuple[Any, Any]) -> None:
    model, processor = whisper
    cache = FeatureCache(Whisper(), model.config)
    plain = transcribe(model, processor, UTTERANCES, language="es")
    assert transcribe(model, processor, UTTERANCES, language="es", cache=cache) == plain
    assert transcribe(model, processor, UTTERANCES, language="es", cache=cache) == plain


def test_no_utterances_no_hypotheses(whisper: tuple[Any, Any]) -> None:
    assert transcribe(*whisper, [], language="es") == []
    table = hypothesis_table([], [], language="es", split="test")
    assert len(table) == 0
    assert table["truncated"].dtype == bool


@given(st.floats(0.01, 30), st.floats(0.01, 30), st.integers(20, 444))
def test_token_limit_grows_with_the_audio_and_stays_in_the_model(a: float, b: float, model_limit: int) -> None:
    assert 0 < token_limit(a, model_limit) <= model_limit
    assert (token_limit(a, model_limit) <= token_limit(b, model_limit)) or a > b


def test_an_explicit_token_limit_truncates_and_says_so(whisper: tuple[Any, Any]) -> None:
    model, processor = whisper
    full = transcribe(model, processor, UTTERANCES, language="es")
    short = transcribe(model, processor, UTTERANCES, language="es", max_new_tokens=3)
    for long, cut in zip(full, short, strict=True):
        assert cut.tokens == min(3, long.tokens)
        assert cut.truncated == (long.tokens >= 3)
        assert long.text.startswith(cut.text)


def test_hypothesis_table_pairs_references_and_leaves_out_what_has_none(whisper: tuple[Any, Any]) -> None:
    utterances = [UTTERANCES[0], dataclasses.replace(UTTERANCES[1], translation=None, speaker="ana")]
    hypotheses = transcribe(*whisper, utterances, language="es")
    table = hypothesis_table(hypotheses, utterances, language="es", split="validation")
    assert list(table.columns) == [
        "id", "language", "task", "split", "speaker", "seconds", "source",
        "reference", "hypothesis", "window", "tokens", "truncated", "spoken", "free",
    ]  # fmt: skip
    assert list(zip(table["id"], table["task"], table["reference"], strict=True)) == [
        ("u0", "transcribe", "hola 0"),
        ("u1", "transcribe", "hola 1"),
        ("u0", "translate", "hello"),
    ]
    assert list(table["hypothesis"]) == [h.text for h in hypotheses[:3]]
    assert table["speaker"].tolist() == [None, "ana", None]
    assert set(table["language"]) == {"es"}
    assert set(table["split"]) == {"validation"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"language": "de"}, "no language 'de'"),
        ({"language": "es", "tasks": ["transcribe", "sing"]}, "the task 'sing' is unknown"),
        ({"language": "es", "window": 8.0}, "utterance u4 lasts 11.0 s, more than the window of 8 s"),
    ],
)
def test_refused_before_any_work(whisper: tuple[Any, Any], settings: dict[str, Any], message: str) -> None:
    done: list[Any] = []
    with pytest.raises(InputError, match=message):
        transcribe(*whisper, UTTERANCES, on_progress=lambda *state: done.append(state), **settings)
    assert done == []


def test_an_english_only_model_is_refused(whisper: tuple[Any, Any]) -> None:
    model, processor = whisper
    model.generation_config.is_multilingual = False
    try:
        with pytest.raises(InputError, match="English-only"):
            transcribe(model, processor, UTTERANCES, language="es")
    finally:
        model.generation_config.is_multilingual = True


def test_load_model_names_what_is_wrong(whisper_folder: Path, tmp_path: Path) -> None:
    def copied(name: str) -> Path:
        return shutil.copytree(whisper_folder, tmp_path / name)

    with pytest.raises(CheckpointError, match="no config"):
        load_model(tmp_path / "nowhere")
    other = copied("other")
    (other / "config.json").write_text(json.dumps({"model_type": "wav2vec2"}))
    with pytest.raises(CheckpointError, match="'wav2vec2'"):
        load_model(other)
    pickled = copied("pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        load_model(pickled)
    cut = copied("cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_model(cut)
    lacking = copied("lacking")
    tensors = load_file(lacking / "model.safetensors")
    del tensors["model.decoder.layers.0.fc1.weight"]
    save_file(tensors, lacking / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lack 1 tensors, model.decoder.layers.0.fc1.weight"):
        load_model(lacking)
    bare = copied("bare")
    for file in bare.iterdir():
        if "token" in file.name or "processor" in file.name:
            file.unlink()
    with pytest.raises(CheckpointError, match="no complete processor"):
        load_model(bare)


def test_load_model_takes_the_type_asked_for(whisper_folder: Path) -> None:
    model, processor = load_model(whisper_folder, torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert not model.training
    found = transcribe(model, processor, UTTERANCES[:2], language="es")
    assert all(set(h.text) <= set("abcdefgh") for h in found)


def test_the_language_heard_comes_from_the_same_encoder_pass(whisper: tuple[Any, Any]) -> None:
    model, processor = whisper
    passes: list[int] = []
    hook = model.get_encoder().register_forward_hook(lambda *_: passes.append(1))
    plain = transcribe(model, processor, UTTERANCES, language="es", batch_seconds=24)
    count = len(passes)
    found = transcribe(model, processor, UTTERANCES, language="es", batch_seconds=24, identify=True)
    hook.remove()
    assert len(passes) == 2 * count
    assert [dataclasses.replace(h, spoken=None, free=None) for h in found] == plain
    half = len(UTTERANCES)
    assert [h.spoken for h in found[:half]] == [h.spoken for h in found[half:]]
    assert {h.free for h in found[half:]} == {None}
    assert any(h.spoken != "es" for h in found)
    for hypothesis, source in zip(found[:half], UTTERANCES, strict=True):
        with torch.inference_mode(), windowed(model, hypothesis.window) as frames:
            features = pad_mels(log_mel([source.audio()], 80), frames)
            token = model.detect_language(features)[0].item()
        assert processor.tokenizer.decode([token]) == f"<|{hypothesis.spoken}|>"
        alone = transcribe(model, processor, [source], language=str(hypothesis.spoken), window=hypothesis.window)[0]
        assert hypothesis.free == alone.text


def test_finished_batches_are_not_decoded_again(whisper: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = whisper
    file = tmp_path / "hypotheses.jsonl"
    passes: list[int] = []

    def stop(*_: Any) -> None:
        passes.append(1)
        if len(passes) == stop_at:
            raise KeyboardInterrupt

    def transcribed(**more: Any) -> Any:
        passes.clear()
        return transcribe(model, processor, UTTERANCES, language="es", batch_seconds=8, identify=True, **more)

    stop_at = 0
    hook = model.get_encoder().register_forward_hook(stop)
    plain = transcribed()
    batches, stop_at = len(passes), 3
    with pytest.raises(KeyboardInterrupt):
        transcribed(finished=file)
    first = file.read_bytes()
    assert first.count(b"\n") == 2 < batches
    stop_at, done = 0, list[tuple[int, int]]()
    # What a kill may leave, and what another command would.
    for tail in (b'[{"id": "u0", "ta', b"[]\n", first.splitlines(keepends=True)[0], b'[{"other": 1}]'):
        file.write_bytes(first + tail)
        assert transcribed(finished=file, on_progress=lambda *state: done.append(state)) == plain
        assert len(passes) == batches - 2
        assert done[-1] == (len(UTTERANCES), len(UTTERANCES))
        assert transcribed(finished=file) == plain
        assert passes == []
    hook.remove()


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("place", ["encoder", "decoder"])
def test_a_batch_that_does_not_fit_in_memory_is_decoded_in_parts(
    whisper: tuple[Any, Any], tmp_path: Path, place: str, beams: int
) -> None:
    """Only GPUs raise such errors, so a hook does here."""
    model, processor = whisper
    tried: list[int] = []

    def full(module: Any, arguments: Any, named: Any) -> None:
        rows = len(arguments[0] if arguments else named["input_ids"])
        tried.append(rows)
        if rows > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def transcribed(name: str) -> Any:
        tried.clear()
        return transcribe(
            model, processor, UTTERANCES, language="es", beams=beams, identify=beams == 1, max_new_tokens=12,
            window=12.0, batch_seconds=48, finished=tmp_path / name,
        )  # fmt: skip

    module = model.model.encoder if place == "encoder" else model.model.decoder
    copies = 1 if place == "encoder" else beams
    most = 100
    hook = module.register_forward_pre_hook(full, with_kwargs=True)
    try:
        plain = transcribed("plain")
        assert max(tried) == 4 * copies
        for most, failures in ((2 * copies, 1), (copies, 2)):
            assert transcribed(str(most)) == plain
            assert sum(rows > most for rows in tried) == failures  # the batches after it are split as well
            assert (tmp_path / str(most)).read_bytes() == (tmp_path / "plain").read_bytes()
        most = 0
        with pytest.raises(
            InputError, match=r"utterance u4 \(11\.0 s\) alone does not fit in the memory of the device"
        ):
            transcribed("none")
    finally:
        hook.remove()


@settings(max_examples=4)
@given(st.permutations(UTTERANCES), st.sampled_from([1.0, 30.0, 80.0, 500.0]), st.booleans())
def test_neither_order_nor_batches_change_a_hypothesis(
    whisper: tuple[Any, Any], order: list[Utterance], batch_seconds: float, identify: bool
) -> None:
    model, processor = whisper

    def decoded(utterances: list[Utterance], seconds: float) -> dict[tuple[str, str], Any]:
        found = transcribe(
            model, processor, utterances, language="es", window=13.0, batch_seconds=seconds, identify=identify,
            max_new_tokens=12,
        )  # fmt: skip
        return {(h.task, h.id): h for h in found}

    assert decoded(order, batch_seconds) == decoded(UTTERANCES, 160.0)


def test_beams_write_what_transformers_own_generate_does(tmp_path: Path) -> None:
    model, processor = load_model(MODEL_FOLDER)
    utterances = [utterance(number, seconds) for number, seconds in enumerate((1.2, 0.6, 3.4, 0.9))]
    found = transcribe(model, processor, utterances, language="es", beams=3, window=4.0)
    greedy = transcribe(model, processor, utterances, language="es", window=4.0)
    for hypothesis, source in zip(found, utterances * 2, strict=True):
        features = processor.feature_extractor(source.audio(), sampling_rate=16_000, return_tensors="pt").input_features
        with torch.inference_mode():
            written = model.generate(
                features[:, :, :400], language="es", task=hypothesis.task, num_beams=3,
                max_new_tokens=token_limit(source.seconds, 124),
            )[0]  # fmt: skip
        assert hypothesis.text == processor.tokenizer.decode(written, skip_special_tokens=True).strip()
    assert [h.text for h in found] != [h.text for h in greedy]


@pytest.fixture(scope="module")
def looping(whisper_folder: Path) -> tuple[Any, Any]:
    """A model whose next token depends on the last one alone, so that every text is soon a loop."""
    model, processor = load_model(whisper_folder)
    with torch.no_grad():
        model.model.decoder.embed_positions.weight.zero_()
        for layer in model.model.decoder.layers:
            for projection in (layer.self_attn.out_proj, layer.encoder_attn.out_proj):
                projection.weight.zero_()
                projection.bias.zero_()
    return model, processor


@pytest.mark.parametrize("beams", [1, 3])
def test_what_loops_is_drawn_again_and_nothing_else(looping: tuple[Any, Any], beams: int) -> None:
    asked: dict[str, Any] = {"language": "es", "beams": beams, "identify": True}
    plain = transcribe(*looping, UTTERANCES[:3], **asked)
    state = torch.get_rng_state()
    found = transcribe(*looping, UTTERANCES[:3], fallback=True, **asked)
    assert torch.equal(torch.get_rng_state(), state)
    assert transcribe(*looping, UTTERANCES[:3], fallback=True, batch_seconds=7, **asked) == found  # whatever the batch
    looped = [loops(h.text) for h in plain]
    assert True in looped
    assert not any(loops(h.text) or loops(h.free or "") for h in found)
    for before, after, again in zip(plain, found, looped, strict=True):
        assert (after.text != before.text) == again
        assert after.tokens <= token_limit(after.seconds, 124)
    assert len({h.text for h in found}) == 3  # each drawn from a seed of its own


def test_what_loops_at_every_temperature_is_kept_as_it_is(looping: tuple[Any, Any]) -> None:
    model, processor = looping
    with torch.no_grad():
        model.model.decoder.layer_norm.weight.mul_(100)  # so sure of each token that none other is drawn
    try:
        asked: dict[str, Any] = {"language": "es", "tasks": ["transcribe"]}
        plain = transcribe(model, processor, UTTERANCES[:3], **asked)
        assert transcribe(model, processor, UTTERANCES[:3], fallback=True, **asked) == plain
        assert any(loops(h.text) for h in plain)
    finally:
        with torch.no_grad():
            model.model.decoder.layer_norm.weight.div_(100)
