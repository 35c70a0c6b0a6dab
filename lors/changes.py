"""One language more or less: the changed experiment file, and whether a new model is worse than the one before it."""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from ruamel.yaml import YAML
from ruamel.yaml.scalarstring import SingleQuotedScalarString

from lors.config import Experiment, load_experiment, parse_experiment
from lors.errors import ConfigError, InputError
from lors.files import storage_errors, write_text
from lors.settings import nearest
from lors.versions import product_of
from lors.yaml_text import read_yaml

__all__ = ["CANDIDATE", "TOLERANCE", "Change", "compare_outputs", "with_language", "without_language"]

CANDIDATE = "candidate"
"""Where, under the output, a new model is until it is known to be no worse."""
TOLERANCE = 1.0
"""Points of WER, CER or BLEU that another language may lose by default."""


@dataclass(frozen=True)
class Change:
    """An experiment file and what becomes of it."""

    file: Path
    after: Experiment
    text: str
    """The new file, with the old one's comments."""
    kept: tuple[str, ...]
    """The languages, guards among them, that both experiments are scored on."""

    def write(self) -> None:
        """Replace the file."""
        with storage_errors(self.file.absolute().parent):
            write_text(self.file, self.text)


def with_language(file: Path, language: str, corpora: Mapping[str, Any] | None = None, afresh: bool = False) -> Change:
    """Add a language to an experiment file; `corpora` is where its speech comes from, None for where the others' does.

    Where the merged model is touched up, the language is added to that model, or, `afresh`, all languages are merged
    and touched up anew. A guard language becomes one with experts. Raises ConfigError, or InputError where there is no
    model to compare with.
    """
    before, data = _read(file)
    if language in before.languages:
        raise ConfigError(f"{file} has the language {language} already: `lors run {file}` trains what is missing of it")
    language = _quoted(language)
    data["languages"].append(language)
    if "sequence" in data and data["sequence"] is not None:
        data["sequence"].append(language)
    if before.merge.touch_up is not None:
        if afresh:
            data["merge"].get("added", {}).pop("languages", None)
        else:
            data["merge"].setdefault("added", {}).setdefault("languages", []).append(language)
    guards = data.get("evaluate", {}).get("guard", [])
    if language in guards:
        guards.remove(language)
    if corpora is not None:
        data.setdefault("corpora_of", {})[language] = _quoted(corpora)
    return _change(file, before, data)


def without_language(file: Path, language: str) -> Change:
    """Take a language out of an experiment file, and all that names it. Raises as `with_language`."""
    before, data = _read(file)
    if language not in before.languages:
        raise ConfigError(
            f"{file} has no language {language!r}{nearest(language, before.languages)}; it has "
            f"{', '.join(before.languages)}"
        )
    if len(before.languages) == 1:
        raise ConfigError(f"{language} is the only language of {file}: there would be nothing to merge")
    for names in (data["languages"], data.get("sequence") or []):
        if language in names:
            names.remove(language)
    corpora, merge = data.get("corpora", {}), data.get("merge", {})
    if (added := (merge.get("added") or {}).get("languages")) is not None:
        if language in added:
            added.remove(language)
        elif len(added) == len(data["languages"]):  # the last of those that were merged first is gone
            added.pop(0)
    for name in (language, f"{language}-transcribe", f"{language}-translate"):
        (merge.get("weights") or {}).pop(name, None)
    if language not in before.held:
        for section in (corpora.get("overrides") or {}, data.get("corpora_of") or {}):
            section.pop(language, None)
    return _change(file, before, data)


def _read(file: Path) -> tuple[Experiment, Any]:
    before = load_experiment(file)
    if before.seeds is not None:
        raise ConfigError(
            f"{file} has `seeds`, a model for each, and one model alone is compared and replaced: change its "
            f"`languages` and `lors run {file}`"
        )
    if not (before.output / "summary.json").is_file():
        raise InputError(
            f"{before.output} has no model that a new one could be compared with: `lors run {file}` makes it"
        )
    return before, _editor().load(file.read_text("utf-8"))


def _change(file: Path, before: Experiment, data: Any) -> Change:
    text = io.StringIO()
    _editor().dump(data, text)
    after = parse_experiment(read_yaml(text.getvalue()), f"{file} with the change")
    kept = tuple(name for name in before.spoken if name in after.spoken)
    return Change(file, after, text.getvalue(), kept)


def _editor() -> YAML:
    editor = YAML()  # keeps comments, quotes and order
    editor.width = 120
    editor.preserve_quotes = True
    return editor


def _quoted(value: Any) -> Any:
    """The value with its texts in quotes where experiments are read (YAML 1.1) as something else, such as `no`; the
    editor writes YAML 1.2.
    """
    if isinstance(value, Mapping):
        return {_quoted(key): _quoted(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_quoted(inner) for inner in value]
    needed = isinstance(value, str) and yaml.safe_dump(value).startswith("'")
    return SingleQuotedScalarString(value) if needed else value


def compare_outputs(before: Path, after: Path, languages: Collection[str], tolerance: float) -> tuple[str, list[str]]:
    """The merged model's main scores of two outputs side by side, as Markdown, and what got worse by more than
    `tolerance` points, such as `es WER`.
    """
    old, new = _scores(before), _scores(after)
    rows = ["| language | metric | before | after | change | |", "| --- | --- | ---: | ---: | ---: | --- |"]
    worse = []
    for (language, metric), value in new.items():
        known = old.get((language, metric)) if language in languages else None
        change = None if known is None else value - known
        loss = None if change is None else (change if metric in ("wer", "cer") else -change)
        mark = ""
        if loss is not None and loss > tolerance:
            worse.append(f"{language} {metric.upper()}")
            mark = "worse"
        shown = ["" if number is None else f"{number:.1f}" for number in (known, value)]
        cells = [language, metric.upper(), *shown, "" if change is None else f"{change:+.1f}", mark]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows), worse


def _scores(output: Path) -> dict[tuple[str, str], float]:
    """The merged system's value by (language, metric)."""
    from lors.model_folder import read_json
    from lors.scoring.files import load_results
    from lors.scoring.results import main_rows

    product = product_of(read_json(output / "summary.json"))["system"]
    rows = main_rows(load_results(output))
    found = rows[rows.system == product].to_dict("records")
    return {(row["language"], row["metric"]): float(row["value"]) for row in found}
