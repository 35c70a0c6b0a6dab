"""The shipped starter base and the recipe that made it say the same."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import pytest

from lors.speech.corpora import synthetic
from lors.starter import MODEL_FOLDER, recipe

CARD_FILE = MODEL_FOLDER / "starter.json"


@pytest.fixture(scope="module")
def card() -> dict[str, Any]:
    assert CARD_FILE.is_file(), f"the starter is not there: python -m lors.starter.recipe {MODEL_FOLDER} --work WORK"
    loaded: dict[str, Any] = json.loads(CARD_FILE.read_text())
    return loaded


@pytest.fixture(scope="module")
def built() -> Any:
    return recipe.build_tokenizer()


def test_weights_are_those_of_the_card(card: dict[str, Any]) -> None:
    content = (MODEL_FOLDER / "model.safetensors").read_bytes()
    assert card["sha256"] == hashlib.sha256(content).hexdigest() == recipe.weights_digest(MODEL_FOLDER)


def test_card_has_the_recipes_settings(card: dict[str, Any]) -> None:
    settings = recipe.TRAINING.model_dump(mode="json")
    assert settings | card["training"] == settings  # settings that are newer than the card are at their defaults
    assert card["utterances_a_language"] == recipe.UTTERANCES
    assert tuple(card["languages"]) == synthetic.LANGUAGES
    assert card["result"]["steps"] == recipe.TRAINING.steps
    assert card["seconds"] > 0
    assert set(card["versions"]) == {"torch", "transformers", "babel", "num2words", "espeakng-loader"}


def test_card_says_what_it_scores(card: dict[str, Any]) -> None:
    scores = card["test_scores"]
    assert set(scores) == set(synthetic.LANGUAGES)
    for language, found in scores.items():
        assert set(found) == ({"wer"} if language == "en" else {"wer", "bleu"})
        assert 15 < found["wer"] < 95, "weak enough that experts have room, and past the onset of attention"


def test_tokenizer(card: dict[str, Any], built: Any) -> None:
    from transformers import WhisperTokenizer

    shipped = WhisperTokenizer.from_pretrained(MODEL_FOLDER)
    assert shipped.get_vocab() == built.get_vocab()
    assert sorted(shipped.get_vocab().values()) == list(range(len(shipped)))
    texts = ["Ça coûte cinq kilos", "Пять метров", " l·l d'aquí", "<|es|><|translate|><|notimestamps|> a<|endoftext|>"]
    for text in texts:
        ids = shipped(text, add_special_tokens=False).input_ids
        assert ids == built(text, add_special_tokens=False).input_ids
        assert shipped.decode(ids) == text
    heard = shipped(
        "<|startoftranscript|><|es|><|transcribe|><|notimestamps|> uno<|endoftext|>", add_special_tokens=False
    )
    assert shipped.decode(heard.input_ids, skip_special_tokens=True) == " uno"
    for name in ("all_special_ids", "eos_token_id", "pad_token_id", "model_max_length"):
        assert getattr(shipped, name) == getattr(built, name), name


def test_config(card: dict[str, Any], built: Any) -> None:
    own = recipe.build_config(built).to_dict()
    shipped = json.loads((MODEL_FOLDER / "config.json").read_text())
    ours = {"architectures", "dtype", "transformers_version"}  # what saving a model adds
    assert {k: v for k, v in shipped.items() if k not in ours} == {
        k: v for k, v in own.items() if k in shipped and k not in ours
    }
    from transformers import WhisperConfig

    assert WhisperConfig.from_pretrained(MODEL_FOLDER).to_diff_dict().keys() - ours == (
        recipe.build_config(built).to_diff_dict().keys() - ours
    )
    assert shipped["max_source_positions"] == 50 * recipe.WINDOW_SECONDS


def test_generation_config(card: dict[str, Any], built: Any) -> None:
    shipped = json.loads((MODEL_FOLDER / "generation_config.json").read_text())
    own = recipe._generation_config(built, recipe.build_config(built)).to_diff_dict()
    assert {k: v for k, v in shipped.items() if k != "transformers_version"} == {
        k: v for k, v in own.items() if k != "transformers_version"
    }
    vocabulary = built.get_vocab()
    assert all(vocabulary[token] == number for token, number in shipped["lang_to_id"].items())
    assert {f"<|{code}|>" for code in synthetic.LANGUAGES} <= shipped["lang_to_id"].keys()


def test_loads_and_is_small(card: dict[str, Any]) -> None:
    from lors.speech.load import load_model

    model, processor = load_model(MODEL_FOLDER)
    assert sum(p.numel() for p in model.parameters()) == card["parameters"]
    assert processor.feature_extractor.chunk_length == recipe.WINDOW_SECONDS
    assert sum(path.stat().st_size for path in MODEL_FOLDER.iterdir()) < 8e6
    assert {path.suffix for path in MODEL_FOLDER.iterdir()} <= {".json", ".safetensors", ".txt", ".md"}


def test_pipeline_hears_its_language(card: dict[str, Any]) -> None:
    """An utterance of the test split, through transformers alone."""
    import soxr
    from transformers import pipeline

    recognise = pipeline("automatic-speech-recognition", model=str(MODEL_FOLDER), device="cpu")
    found = []
    for candidate in synthetic.candidates("es", "test", 5, recipe.SEED):
        samples, rate = candidate.load()
        audio = np.asarray(soxr.resample(samples, rate, 16_000))
        text = recognise({"raw": audio, "sampling_rate": 16_000}, generate_kwargs={"language": "es"})["text"]
        found.append((set(text.lower().split()), set((candidate.text or "").lower().split())))
    heard = sum(len(words & expected) for words, expected in found)
    assert heard >= 3, found
