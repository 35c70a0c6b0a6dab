from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lors.errors import CheckpointError, ConfigError
from lors.speech.architecture import Moonshine, Whisper
from lors.speech.base_model import ARCHITECTURES, check_base, is_english_only

BOTH = ("transcribe", "translate")
MULTILINGUAL = {"is_multilingual": True, "lang_to_id": {"<|es|>": 5, "<|fr|>": 6, "<|yue|>": 7}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "model"


def write(folder: Path, config: Any, generation: Any = None) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))


@pytest.mark.parametrize(
    ("config", "generation", "languages", "tasks", "native"),
    [
        ({"model_type": "whisper"}, MULTILINGUAL, ["es", "yue"], BOTH, 30.0),
        ({"model_type": "whisper", "max_source_positions": 200}, MULTILINGUAL, ["fr"], ["translate"], 4.0),
        # Before `is_multilingual` there was only lang_to_id.
        ({"model_type": "whisper", "vocab_size": 51865}, {"lang_to_id": {"<|de|>": 9}}, ["de"], BOTH, 30.0),
        ({"model_type": "whisper"}, {"is_multilingual": False}, ["en"], ["transcribe"], 30.0),
        ({"model_type": "whisper", "vocab_size": 51864}, {}, ["en"], ["transcribe"], 30.0),
        ({"model_type": "moonshine"}, None, ["en"], ["transcribe"], 30.0),
        ({"model_type": "moonshine"}, {}, ["es", "vi"], ["transcribe"], 30.0),
    ],
)
def test_bases_that_fit(
    folder: Path, config: Any, generation: Any, languages: Sequence[str], tasks: Sequence[str], native: float
) -> None:
    write(folder, config, generation)
    assert check_base(folder, "mine", languages, tasks) == native


@pytest.mark.parametrize(
    ("config", "generation", "languages", "tasks", "error", "message"),
    [
        (
            {"model_type": "whisper"}, MULTILINGUAL, ["es", "de"], BOTH, ConfigError,
            "the base mine has no token for 'de', choose another language or base (it has es, fr, yue)",
        ),
        ({"model_type": "whisper"}, {"is_multilingual": True}, ["es"], BOTH, CheckpointError, "has no lang_to_id"),
        ({"model_type": "whisper"}, {}, ["es"], BOTH, CheckpointError, "is not multilingual"),
        ({"model_type": "whisper"}, None, ["es"], BOTH, CheckpointError, "model has no generation_config.json"),
        ({"model_type": "whisper"}, {"is_multilingual": False}, ["es"], ["transcribe"], ConfigError, "English-only"),
        ({"model_type": "whisper"}, {"is_multilingual": False}, ["en", "es"], ["transcribe"], ConfigError, "[en]"),
        ({"model_type": "whisper", "vocab_size": 51864}, {}, ["en"], BOTH, ConfigError, "tasks: [transcribe]"),
        ({"model_type": "moonshine"}, None, ["en"], BOTH, ConfigError, "tasks: the base mine is a Moonshine"),
        ({"model_type": "wav2vec2"}, None, ["en"], BOTH, CheckpointError, "of type 'wav2vec2': LoRS works on Whisper"),
        ({"model_type": "seamless_m4t"}, None, ["en"], BOTH, CheckpointError, "of type 'seamless_m4t'"),
        ({"model_type": "speech-encoder-decoder"}, None, ["en"], BOTH, CheckpointError, "'speech-encoder-decoder'"),
        ({}, None, ["en"], BOTH, CheckpointError, "of type None"),
        ([], None, ["en"], BOTH, CheckpointError, "config.json is not a JSON object"),
    ],
)  # fmt: skip
def test_bases_that_do_not(
    folder: Path,
    config: Any,
    generation: Any,
    languages: Sequence[str],
    tasks: Sequence[str],
    error: type[Exception],
    message: str,
) -> None:
    write(folder, config, generation)
    with pytest.raises(error, match=re.escape(message)):
        check_base(folder, "mine", languages, tasks)


def test_a_folder_that_is_none(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model has no config\.json"):
        check_base(folder, "mine", ["es"], BOTH)


def test_the_generation_config_says_what_is_english_only_before_the_vocabulary() -> None:
    assert not is_english_only({"vocab_size": 51864}, {"is_multilingual": True})
    assert is_english_only({"vocab_size": 51865}, {"is_multilingual": False})
    assert not is_english_only({}, {})


def test_the_architectures_are_those_that_are_implemented() -> None:
    assert {Whisper.name, Moonshine.name} == set(ARCHITECTURES)


def test_it_imports_no_torch() -> None:
    code = "import sys, lors.speech.base_model; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
