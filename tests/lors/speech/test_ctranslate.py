"""CTranslate2 beside transformers: the same tokens, and refused where it would write others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from speech_sounds import utterance

from lors.errors import ConfigError
from lors.speech import ctranslate
from lors.speech.ctranslate import CTranslate2Writer, require_ctranslate2
from lors.speech.load import load_model
from lors.speech.transcribe import transcribe
from lors.starter import MODEL_FOLDER

UTTERANCES = [utterance(number, seconds) for number, seconds in enumerate((1.2, 0.6, 2.4, 0.9, 3.8, 1.7))]


@pytest.mark.parametrize("trained", [True, False])
def test_every_token_is_that_of_transformers(trained: bool, whisper_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("ctranslate2")
    source = MODEL_FOLDER if trained else whisper_folder
    model, processor = load_model(source)
    # What OpenAI's models may not begin with; here what they would begin with.
    model.generation_config.begin_suppress_tokens = processor.tokenizer(" P").input_ids[:1]
    writer = CTranslate2Writer(model, processor, source, tmp_path / "converted")
    encoded, ended = list[Any](), set[bool]()
    hook = model.get_encoder().register_forward_hook(lambda *_: encoded.append(1))
    for settings in ({}, {"window": 4.0, "batch_seconds": 5.0}, {"max_new_tokens": 2}, {"max_new_tokens": 3}):
        everything: dict[str, Any] = {"language": "es", "identify": True, **settings}
        plain = transcribe(model, processor, UTTERANCES, **everything)
        encoded.clear()
        assert transcribe(model, processor, UTTERANCES, writer=writer, **everything) == plain
        assert encoded == []
        assert any(h.spoken != "es" and h.free != h.text for h in plain)
        ended |= {h.truncated for h in plain}
    hook.remove()
    assert ended == {True, False}


def test_what_it_does_in_another_way_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ctranslate2")
    with pytest.raises(ConfigError, match=r"beam search .* set evaluate.backend to transformers, or evaluate.beams"):
        require_ctranslate2("whisper", 2)
    with pytest.raises(ConfigError, match="cannot decode a model of type 'moonshine'"):
        require_ctranslate2("moonshine", 1)
    with pytest.raises(ConfigError, match=r"from a seed: set evaluate.backend to transformers, or evaluate.fallback"):
        require_ctranslate2("whisper", 1, fallback=True)
    model, processor = load_model(MODEL_FOLDER)
    model.generation_config.no_repeat_ngram_size = 3
    with pytest.raises(ConfigError, match="sets no_repeat_ngram_size to 3"):
        CTranslate2Writer(model, processor, MODEL_FOLDER, tmp_path / "converted")
    monkeypatch.setattr(ctranslate.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'lors\[ctranslate2\]'"):
        require_ctranslate2("whisper", 1)
