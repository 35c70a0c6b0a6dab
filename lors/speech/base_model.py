"""Which models LoRS works on, seen from the JSON files of a folder. No torch here, so `lors plan` stays fast."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lors.errors import CheckpointError, ConfigError
from lors.model_folder import read_json

__all__ = ["ARCHITECTURES", "MOONSHINE_SECONDS", "check_base", "is_english_only", "unsupported"]

ARCHITECTURES = ("moonshine", "whisper")
"""The `model_type` of the models that LoRS trains and decodes."""

MOONSHINE_SECONDS = 30.0
"""The longest speech that Moonshine was trained on (Jeffries et al. 2024, section 3.2); its encoder has no limit."""


def unsupported(what: str, model_type: object) -> CheckpointError:
    """The error for a model of another architecture; `what` is the subject of the sentence, such as `the base X`."""
    return CheckpointError(
        f"{what} is of type {model_type!r}: LoRS works on Whisper models (multilingual, English-only or distilled) and "
        "on Moonshine"
    )


def is_english_only(config: Mapping[str, Any], generation: Mapping[str, Any]) -> bool:
    """Whether a Whisper takes no language and no task, from its config.json and its generation_config.json.

    Models without that setting, such as those saved by other tools, are known by the size of OpenAI's English
    vocabulary, as in OpenAI's own code. Their tokenizer does not tell: it has the tokens of all languages.
    """
    multilingual = generation.get("is_multilingual")
    return config.get("vocab_size") == 51864 if multilingual is None else not multilingual


def check_base(folder: Path, name: str, languages: Sequence[str], tasks: Sequence[str]) -> float:
    """The native window in seconds of the model in `folder`, which the experiment calls `name`.

    Raises:
        CheckpointError: the folder is no model that LoRS works on.
        ConfigError: the model does not take one of the `languages` (experts' and guards') or of the `tasks`.
    """
    config = read_json(folder / "config.json")
    model_type = config.get("model_type")
    if model_type == "moonshine":
        if "translate" in tasks:
            raise ConfigError(f"tasks: the base {name} is a Moonshine, which cannot translate; leave translate out")
        return MOONSHINE_SECONDS
    if model_type != "whisper":
        raise unsupported(f"the base {folder}", model_type)
    generation = read_json(folder / "generation_config.json")
    known = generation.get("lang_to_id")
    if is_english_only(config, generation):
        if list(languages) != ["en"] or "translate" in tasks:
            raise ConfigError(
                f"the base {name} is an English-only Whisper: take a multilingual one, or write languages: [en] and "
                "tasks: [transcribe]"
            )
    elif not known:
        raise CheckpointError(f"the base {folder} is not multilingual: its generation_config.json has no lang_to_id")
    else:
        for language in languages:
            if f"<|{language}|>" not in known:
                codes = ", ".join(sorted(token.strip("<|>") for token in known))
                raise ConfigError(
                    f"the base {name} has no token for {language!r}, choose another language or base (it has {codes})"
                )
    return float(config.get("max_source_positions", 1500)) / 50
