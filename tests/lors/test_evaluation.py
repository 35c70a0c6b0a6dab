"""What `lors evaluate` is asked, before anything is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lors.errors import LorsError
from lors.evaluation import corpora_of, name_models, request

MODELS = {"starter": "starter"}


def test_models_have_the_names_given_or_their_last_part() -> None:
    given = ["base=openai/whisper-small", "outputs/demo/model", "facebook/other", "runs/lr=3/model-2"]
    assert name_models(given) == {
        "base": "openai/whisper-small",
        "model": "outputs/demo/model",
        "other": "facebook/other",
        "model-2": "runs/lr=3/model-2",
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["a/model", "b/model"], "two models are called model: give them names, as in first=a/model other=b/model"),
        (["x="], "'x=' names no model"),
        (["not a name=starter"], "names no model: give a folder or hub id, or NAME=MODEL"),
    ],
)
def test_names_that_do_not_tell_models_apart(given: list[str], message: str) -> None:
    with pytest.raises(LorsError, match=message):
        name_models(given)


def test_a_corpus_is_known_by_its_form(tmp_path: Path) -> None:
    (tmp_path / "calls.jsonl").write_text("")
    assert corpora_of("synthetic") == {"source": "synthetic"}
    assert corpora_of("fleurs") == {"source": "datasets", "preset": "fleurs"}
    assert corpora_of("data/{language}/{split}.tsv") == {"source": "manifest", "path": "data/{language}/{split}.tsv"}
    assert corpora_of(str(tmp_path)) == {"source": "folder", "path": str(tmp_path)}
    assert corpora_of("google/fleurs") == {"source": "datasets", "path": "google/fleurs"}
    one = request(MODELS, str(tmp_path / "calls.jsonl"), languages=["es"], limit=3, output=tmp_path / "out")
    assert one.speech_of("es").path.format(language="es", split="test") == str(tmp_path / "calls.jsonl")  # type: ignore[union-attr]
    assert one.speech_of("es").limits.test == 3  # type: ignore[union-attr]
    assert one.tasks == ("transcribe",)


def test_an_experiment_s_file_gives_what_is_not_said(tmp_path: Path) -> None:
    file = tmp_path / "experiment.yaml"
    file.write_text(
        "base: none\nlanguages: [es, fr]\ncorpora: {source: synthetic, overrides: {es: {test: 9, train: 4}}}\n"
        "evaluate: {beams: 3, guard: [it]}\noutput: here\nstore: there\nmerge: {scaling: 1}\n"
    )
    own = request(MODELS, str(file), limit=5)
    assert (own.base, own.spoken, own.tasks) == ("starter", ("es", "fr", "it"), ("transcribe", "translate"))
    assert (own.evaluate.beams, own.store, own.output) == (3, Path("there"), Path("outputs/evaluation"))
    assert {own.speech_of(code).utterances.test for code in own.spoken} == {5}  # type: ignore[union-attr]
    assert own.speech_of("es").utterances.train == 4  # type: ignore[union-attr]
    other = request(MODELS, str(file), languages=["fr"], tasks=["translate"], changes=["evaluate.beams=1"])
    assert (other.spoken, other.tasks, other.evaluate.beams) == (("fr",), ("translate",), 1)


@pytest.mark.parametrize(
    ("corpus", "options", "message"),
    [
        ("synthetic", {}, "give the language that is spoken"),
        ("nowhere", {"languages": ["es"]}, "'nowhere' is neither an experiment's YAML file, a folder"),
        ("no.yaml", {}, "the experiment file no.yaml cannot be read"),
        ("synthetic", {"languages": ["Spanish"]}, "languages.0 should be a language code"),
        ("synthetic", {"languages": ["es"], "changes": ["evaluate.beems=2"]}, "did you mean 'beams'"),
    ],
)
def test_what_is_wrong_is_named(corpus: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(LorsError, match=message):
        request(MODELS, corpus, **options)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("corpora: {source: synthetic, overrides: {es: }}", "corpora.overrides.es should be a mapping"),
        ("corpora: {source: synthetic, overrides: [es]}", "corpora.overrides should be a mapping"),
        ("corpora: {source: folder, path: x, overrides: {es: {limits: 3}}}", "corpora.overrides.es.limits should be a"),
        ("corpora: {source: synthetic}\ncorpora_of: [es]", "corpora_of should be a mapping"),
        ("corpora: {source: synthetic}\nevaluate: 5", "evaluate should be a mapping"),
        ("corpora: {source: synthetic}\nstore: 2026-13-01", "cannot be read: month must be in 1..12"),
        ("corpora: {source: synthetic}\ncorpora: {source: folder}", "the key 'corpora' is on line 2 and again on"),
    ],
)
def test_what_is_wrong_in_an_experiment_s_file_is_named(line: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "e.yaml").write_text(f"languages: [es]\n{line}\n")
    with pytest.raises(LorsError, match=message):
        request(MODELS, str(tmp_path / "e.yaml"), languages=["es"], limit=2)


def test_one_table_is_of_one_language(tmp_path: Path) -> None:
    (tmp_path / "calls.csv").write_text("")
    with pytest.raises(LorsError, match="is one table for es, fr: give one --language"):
        request(MODELS, str(tmp_path / "calls.csv"), languages=["es", "fr"])
