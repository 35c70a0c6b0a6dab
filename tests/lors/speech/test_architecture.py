"""Every kind of model that LoRS takes, from its folder to its text; and every other kind refused."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from speech_sounds import sound, utterance
from transformers import (
    GenerationConfig,
    MoonshineConfig,
    MoonshineForConditionalGeneration,
    PreTrainedTokenizerFast,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Processor,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

from lors.errors import CheckpointError, InputError
from lors.speech.architecture import (
    Architecture,
    FeatureCache,
    Moonshine,
    Whisper,
    architecture_of,
    require_language,
)
from lors.speech.base_model import MOONSHINE_SECONDS
from lors.speech.features import log_mel, pad_mels
from lors.speech.load import load_model
from lors.speech.transcribe import token_limit, transcribe

UTTERANCES = [utterance(number, seconds) for number, seconds in enumerate((1.2, 0.6, 2.4, 0.9, 1.7))]
TEXTS = ("the quick brown fox", "jumps over the lazy dog", "hola 0 hola 1 hola 2 hola 3 hola 4")


def distilled(folder: Path) -> None:
    """More encoder layers than decoder layers, and large-v3's 128 mels; multilingual."""
    save_whisper(folder, english=False, encoder_layers=3, decoder_layers=1, num_mel_bins=128)


def english(folder: Path) -> None:
    """As OpenAI's: the tokenizer has languages and tasks, the generation config says that they are of no use."""
    save_whisper(folder, english=True, encoder_layers=1, decoder_layers=1, num_mel_bins=80)


def save_whisper(folder: Path, *, english: bool, **sizes: int) -> None:
    from tokenizers import pre_tokenizers

    alphabet = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = WhisperTokenizer(vocab=alphabet, merges=[])
    names = ["<|startoftranscript|>", "<|en|>", "<|es|>", "<|translate|>", "<|transcribe|>", "<|notimestamps|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in [*names, "<|endoftext|>"]}
    end = ids["<|endoftext|>"]
    special = {
        "pad_token_id": end,
        "bos_token_id": end,
        "eos_token_id": end,
        "decoder_start_token_id": ids["<|startoftranscript|>"],
    }
    torch.manual_seed(1)
    model = WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=len(tokenizer), d_model=32, encoder_attention_heads=2, decoder_attention_heads=2,
            encoder_ffn_dim=64, decoder_ffn_dim=64, max_target_positions=64, init_std=0.4, **special, **sizes,
        )
    )  # fmt: skip
    multilingual = {
        "lang_to_id": {name: ids[name] for name in ("<|en|>", "<|es|>")},
        "task_to_id": {name: ids[f"<|{name}|>"] for name in ("translate", "transcribe")},
    }
    kept = {end, *(alphabet[letter] for letter in "abcdefgh")}
    model.generation_config = GenerationConfig(
        max_length=64,
        is_multilingual=not english,
        no_timestamps_token_id=ids["<|notimestamps|>"],
        # What OpenAI's English-only models write first; the others take it from language and task.
        forced_decoder_ids=[[1, ids["<|notimestamps|>"]]] if english else None,
        suppress_tokens=[number for number in range(len(tokenizer)) if number not in kept],
        **special,
        **({} if english else multilingual),
    )
    model.save_pretrained(folder)
    WhisperProcessor(WhisperFeatureExtractor(sizes["num_mel_bins"]), tokenizer).save_pretrained(folder)


def moonshine(folder: Path) -> None:
    """Its tokenizer is Llama's: it puts a space before the text itself, and `<s>` before that."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers

    pieces = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    pieces.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    pieces.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    pieces.train_from_iterator(TEXTS, trainer)
    pieces.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=pieces, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    torch.manual_seed(1)
    model = MoonshineForConditionalGeneration(
        MoonshineConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, encoder_num_hidden_layers=2,
            decoder_num_hidden_layers=1, encoder_num_attention_heads=2, decoder_num_attention_heads=2,
            max_position_embeddings=48, initializer_range=0.6, pad_token_id=2,
        )
    )  # fmt: skip
    model.save_pretrained(folder)
    extractor = Wav2Vec2FeatureExtractor(do_normalize=False, return_attention_mask=True)
    Wav2Vec2Processor(extractor, tokenizer).save_pretrained(folder)


KINDS: dict[str, Callable[[Path], None]] = {"distilled": distilled, "english": english, "moonshine": moonshine}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("architectures")
    for kind, make in KINDS.items():
        make(root / kind)
    return {kind: root / kind for kind in KINDS}


@pytest.fixture(scope="module", params=list(KINDS))
def loaded(request: pytest.FixtureRequest, folders: dict[str, Path]) -> tuple[str, Any, Any]:
    model, processor = load_model(folders[request.param])
    assert not model.training
    return request.param, model, processor


def written_by_transformers(kind: str, model: Any, processor: Any, audio: np.ndarray, window: float, most: int) -> str:
    """The text of one utterance, all through transformers' own feature extractor and `generate`."""
    if kind == "moonshine":
        inputs = processor(audio, sampling_rate=16_000, return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=most)
    else:
        frames = round(window * 100)
        mel = processor.feature_extractor(audio, sampling_rate=16_000, return_tensors="pt").input_features
        with architecture_of(model).windowed(model, window):
            asked = {} if kind == "english" else {"language": "en", "task": "transcribe"}
            tokens = model.generate(mel[:, :, :frames], max_new_tokens=most, **asked)
    text: str = processor.tokenizer.decode(tokens[0], skip_special_tokens=True)
    return text.strip()


def test_every_kind_writes_what_transformers_own_generate_does(loaded: tuple[str, Any, Any]) -> None:
    kind, model, processor = loaded
    architecture = architecture_of(model)
    found = transcribe(model, processor, UTTERANCES, language="en", tasks=["transcribe"], batch_seconds=1)
    assert [h.id for h in found] == [u.id for u in UTTERANCES]
    most = (
        architecture.token_limit(model.config) - 1 - len(architecture.prefix(processor.tokenizer, "en", "transcribe"))
    )
    texts = [
        written_by_transformers(kind, model, processor, u.audio(), h.window, token_limit(u.seconds, most))
        for h, u in zip(found, UTTERANCES, strict=True)
    ]
    assert [h.text for h in found] == texts
    assert len(set(texts)) > 3
    assert [h.window for h in found] == [u.seconds if kind == "moonshine" else 7.0 for u in UTTERANCES]


def test_batches_beams_caches_and_types_of_every_kind(loaded: tuple[str, Any, Any], folders: dict[str, Path]) -> None:
    kind, model, processor = loaded

    def texts(**settings: Any) -> list[str]:
        found = transcribe(model, processor, UTTERANCES, language="en", tasks=["transcribe"], **settings)
        return [hypothesis.text for hypothesis in found]

    cache = FeatureCache(architecture_of(model), model.config)
    plain = texts()
    assert texts(cache=cache) == texts(cache=cache) == plain
    assert texts(beams=3) != plain
    if kind != "moonshine":  # which hears its padding
        assert texts(batch_seconds=1) == plain
    half, _ = load_model(folders[kind], torch.bfloat16)
    found = transcribe(half, processor, UTTERANCES, language="en", tasks=["transcribe"], max_new_tokens=4)
    assert half.dtype == torch.bfloat16
    assert all(h.tokens <= 4 for h in found)


def test_a_batch_of_moonshine_is_what_its_processor_makes(folders: dict[str, Path]) -> None:
    model, processor = load_model(folders["moonshine"])
    audios = [u.audio() for u in UTTERANCES]
    expected = processor(audios, sampling_rate=16_000, padding=True, return_tensors="pt")
    architecture = Moonshine()
    found = architecture.collate(model.config, architecture.features(model.config, audios), 2.4)
    assert set(found) == {"input_values", "attention_mask"}
    assert torch.equal(found["input_values"], expected["input_values"])
    assert torch.equal(found["attention_mask"], expected["attention_mask"])
    together = transcribe(model, processor, UTTERANCES, language="en", tasks=["transcribe"], batch_seconds=99)
    assert [h.window for h in together] == [1.2, 0.6, 2.4, 1.2, 1.7]  # what is much shorter starts a batch
    pair = [audios[0], audios[3]]
    inputs = processor(pair, sampling_rate=16_000, padding=True, return_tensors="pt")
    written = model.generate(**inputs, max_new_tokens=47).tolist()
    for place, tokens in zip((0, 3), written, strict=True):
        kept = tokens[: 1 + token_limit(UTTERANCES[place].seconds, 47)]
        assert together[place].text == processor.decode(kept, skip_special_tokens=True).strip()


@pytest.mark.parametrize("samples", [0, 1, 300, 894, 895, 896])
def test_moonshine_hears_audio_of_any_length(folders: dict[str, Path], samples: int) -> None:
    model, _ = load_model(folders["moonshine"])
    architecture = Moonshine()
    audio = sound(0.1)[:samples]
    inputs = architecture.collate(model.config, architecture.features(model.config, [audio]), samples / 16_000)
    with torch.no_grad():
        encoded = model.get_encoder()(**inputs)
    assert encoded.last_hidden_state.shape == (1, 1, 32)
    assert bool(encoded.last_hidden_state.isfinite().all())


def test_every_kind_learns(loaded: tuple[str, Any, Any], folders: dict[str, Path]) -> None:
    kind, _, processor = loaded
    model, _ = load_model(folders[kind])
    architecture, tokenizer = architecture_of(model), processor.tokenizer
    prefix = architecture.prefix(tokenizer, "en", "transcribe")
    targets = [[*prefix, *architecture.text_tokens(tokenizer, u.text), tokenizer.eos_token_id] for u in UTTERANCES]
    longest = max(map(len, targets))
    labels = torch.tensor([target + [-100] * (longest - len(target)) for target in targets])
    window = architecture.window_for(model.config, 2.4, "auto")
    features = FeatureCache(architecture, model.config).features(UTTERANCES)
    inputs = architecture.collate(model.config, features, window)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(12):
        with architecture.windowed(model.train(), window):
            loss = model(**inputs, labels=labels, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    found = transcribe(model, processor, UTTERANCES, language="en", tasks=["transcribe"])
    assert len(found) == len(UTTERANCES)


def test_the_text_tokens_are_those_that_the_model_writes(loaded: tuple[str, Any, Any]) -> None:
    kind, _, processor = loaded
    architecture: Architecture = Moonshine() if kind == "moonshine" else Whisper()
    for text in ("hola 0", "  the lazy dog\n"):
        tokens = architecture.text_tokens(processor.tokenizer, text)
        assert not set(tokens) & set(processor.tokenizer.all_special_ids)
        assert processor.tokenizer.decode(tokens).strip() == text.strip()
        first = processor.tokenizer.convert_ids_to_tokens(tokens[:2])
        assert first[0][0] in "Ġ▁"  # one space before the first word
        assert "".join(first)[1] == text.strip()[0]


def test_prefixes(folders: dict[str, Path], whisper_folder: Path) -> None:
    tokenizers = {kind: load_model(folder)[1].tokenizer for kind, folder in folders.items()}
    names = {
        ("distilled", "es", "translate"): ["<|es|>", "<|translate|>", "<|notimestamps|>"],
        ("distilled", "en", "transcribe"): ["<|en|>", "<|transcribe|>", "<|notimestamps|>"],
        ("english", "en", "transcribe"): ["<|notimestamps|>"],
        ("moonshine", "en", "transcribe"): [],
        ("moonshine", "es", "transcribe"): [],
    }
    for (kind, language, task), expected in names.items():
        model, _ = load_model(folders[kind])
        found = architecture_of(model).prefix(tokenizers[kind], language, task)
        assert tokenizers[kind].convert_ids_to_tokens(found) == expected
    with pytest.raises(InputError, match=r"no language 'de'.*which has en, es"):
        Whisper().prefix(tokenizers["distilled"], "de", "transcribe")
    with pytest.raises(InputError, match=r"no token <\|sing\|>"):
        Whisper().prefix(tokenizers["distilled"], "es", "sing")
    for language, task in (("es", "transcribe"), ("en", "translate")):
        with pytest.raises(InputError, match=f"English-only Whisper, which cannot {task} '{language}'"):
            Whisper(english_only=True).prefix(tokenizers["english"], language, task)
    with pytest.raises(InputError, match="Moonshine, which cannot translate"):
        Moonshine().prefix(tokenizers["moonshine"], "en", "translate")


def test_only_multilingual_models_say_which_language_they_hear(loaded: tuple[str, Any, Any]) -> None:
    kind, model, processor = loaded
    names = {"distilled": ("en", "es")}.get(kind, ())
    languages = architecture_of(model).languages(processor.tokenizer)
    assert languages == {name: processor.tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in names}
    found = transcribe(model, processor, UTTERANCES, language="en", tasks=["transcribe"], identify=True)
    assert {h.spoken for h in found} <= ({*names} if names else {None})
    assert all((h.free is None) == (not names) for h in found)


def test_require_language_in_each_place_that_knows_languages(whisper_folder: Path) -> None:
    model, processor = load_model(whisper_folder)
    ids = {require_language(source, "yue") for source in (processor, processor.tokenizer, model.generation_config)}
    assert ids == {processor.tokenizer.convert_tokens_to_ids("<|yue|>")}
    for source in (processor, processor.tokenizer, model.generation_config):
        with pytest.raises(InputError, match=r"no language 'de'.*which has es, fr, yue"):
            require_language(source, "de")


def test_architecture_of_a_model_or_its_config(folders: dict[str, Path]) -> None:
    models = {kind: load_model(folder)[0] for kind, folder in folders.items()}
    assert architecture_of(models["moonshine"]) == architecture_of(models["moonshine"].config) == Moonshine()
    assert architecture_of(models["distilled"]) == architecture_of(models["distilled"].config) == Whisper()
    assert architecture_of(models["english"]) == Whisper(english_only=True)
    # OpenAI's vocabularies tell by their sizes.
    assert architecture_of(WhisperConfig(vocab_size=51864)) == Whisper(english_only=True)
    assert architecture_of(WhisperConfig(vocab_size=51865)) == architecture_of(WhisperConfig(vocab_size=51866))
    assert architecture_of(WhisperConfig()) == Whisper(english_only=False)


def test_windows_and_limits() -> None:
    small = WhisperConfig(max_source_positions=200)
    assert [Whisper().window_for(WhisperConfig(), s, "auto") for s in (1, 5.1, 29)] == [7, 7.5, 30]
    assert [Whisper().window_for(small, 1.2, setting) for setting in ("auto", 3.0, 9.0)] == [1.5, 3.0, 4.0]
    assert (Whisper().native_window(small), Whisper().token_limit(small)) == (4.0, 448)
    config = MoonshineConfig(max_position_embeddings=194)
    assert [Moonshine().window_for(config, s, "auto") for s in (0.3, 5.1, 31)] == [0.3, 5.1, MOONSHINE_SECONDS]
    assert [Moonshine().window_for(config, 5.1, setting) for setting in (4.0, 30.0)] == [4.0, 5.1]
    assert (Moonshine().native_window(config), Moonshine().token_limit(config)) == (30.0, 194)


def test_whispers_batches_are_padded_to_the_encoders_frames() -> None:
    config = WhisperConfig(max_source_positions=200)
    mels = log_mel([sound(1.0), sound(0.4)], 80)
    for seconds, frames in ((1.5, 150), (1.51, 152), (4.0, 400), (9.0, 400)):
        found = Whisper().collate(config, mels, seconds)
        assert list(found) == ["input_features"]
        assert torch.equal(found["input_features"], pad_mels(mels, frames))


OTHERS = ("speech-encoder-decoder", "seamless_m4t", "wav2vec2", "speech_to_text", "moonshine_streaming", None)


@pytest.mark.parametrize("model_type", OTHERS)
def test_other_architectures_are_refused_by_name(whisper_folder: Path, tmp_path: Path, model_type: str | None) -> None:
    folder = shutil.copytree(whisper_folder, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
    message = f"other is of type {model_type!r}: LoRS works on Whisper models .* and on Moonshine"
    with pytest.raises(CheckpointError, match=message):
        load_model(folder)


def test_architecture_of_names_what_it_does_not_support() -> None:
    from transformers import Speech2TextConfig

    with pytest.raises(InputError, match="the model is of type 'speech_to_text'"):
        architecture_of(Speech2TextConfig())


def test_a_folder_with_half_a_processor_is_incomplete(folders: dict[str, Path], tmp_path: Path) -> None:
    for number, kept in enumerate(("tokenizer", "processor")):
        folder = shutil.copytree(folders["moonshine"], tmp_path / str(number))
        for file in folder.iterdir():
            if ("token" in file.name or "processor" in file.name) and kept not in file.name:
                file.unlink()
        with pytest.raises(CheckpointError, match="no complete processor"):
            load_model(folder)


def test_moonshine_as_its_authors_publish_it(folders: dict[str, Path], tmp_path: Path) -> None:
    """The feature extractor in a file of its own, and no generation config."""
    folder = shutil.copytree(folders["moonshine"], tmp_path / "published")
    extractor = json.loads((folder / "processor_config.json").read_text())["feature_extractor"]
    (folder / "preprocessor_config.json").write_text(json.dumps(extractor | {"processor_class": "Wav2Vec2Processor"}))
    (folder / "processor_config.json").unlink()
    (folder / "generation_config.json").unlink()
    texts = [
        [h.text for h in transcribe(*load_model(place), UTTERANCES, language="en", tasks=["transcribe"])]
        for place in (folder, folders["moonshine"])
    ]
    assert texts[0] == texts[1]


class Counted:
    def __init__(self, number: int) -> None:
        self.id, self.reads = f"u{number}", 0

    def audio(self) -> np.ndarray:
        self.reads += 1
        return sound(0.5, seed=int(self.id[1:]))


@pytest.mark.parametrize(("architecture", "config"), [(Whisper(), WhisperConfig()), (Moonshine(), MoonshineConfig())])
@pytest.mark.parametrize("budget", [0, 60_000, 1 << 30])
def test_cached_features_are_those_of_no_cache(architecture: Architecture, config: Any, budget: int) -> None:
    items = [utterance(number, 0.5 + 0.1 * number) for number in range(4)]  # 15 to 51 kB of features each
    cache = FeatureCache(architecture, config, budget)
    expected = [architecture.features(config, [u.audio()])[0] for u in items]
    for order in (items, items[::-1], items[1:3], items):
        for item, found in zip(order, cache.features(order), strict=True):
            torch.testing.assert_close(found, expected[items.index(item)], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("architecture", "config"), [(Whisper(), WhisperConfig()), (Moonshine(), MoonshineConfig())])
def test_the_cache_computes_what_fits_once_and_batches_are_copies(architecture: Architecture, config: Any) -> None:
    items = [Counted(number) for number in range(3)]
    size = architecture.features(config, [sound(0.5)])[0].nbytes
    cache = FeatureCache(architecture, config, math.floor(2.5 * size))
    expected = [tensor.clone() for tensor in cache.features(items)]
    for _ in range(3):
        for tensor in architecture.collate(config, cache.features(items), 1.0).values():
            tensor.zero_()
    assert [item.reads for item in items] == [1, 1, 4]
    for found, before in zip(cache.features(items), expected, strict=True):
        torch.testing.assert_close(found, before, rtol=0, atol=1e-6)
