"""One language more or less in an experiment file, and what counts as worse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from lors.changes import Change, compare_outputs, with_language, without_language
from lors.config import load_experiment
from lors.errors import ConfigError, InputError
from lors.scoring.files import write_results

TEXT = """\
# the speech of the office
base: starter
languages: [es, fr]  # in the order of the table
corpora:
  source: synthetic
  utterances: {train: 6, validation: 2, test: 3}
  overrides: {fr: {train: 4}}
merge: {weights: {fr: 0.5, es-translate: 2}}
evaluate: {guard: [it, de]}
sequence: [fr, es]
output: 'OUT'
"""


def experiment(folder: Path, text: str = TEXT) -> Path:
    (folder / "out").mkdir()
    (folder / "out" / "summary.json").write_text("{}")
    file = folder / "e.yaml"
    file.write_text(text.replace("OUT", str(folder / "out")))
    return file


def lines(change: Change) -> set[str]:
    """What became of the file, without the lines that stayed."""
    return set(change.text.splitlines()) - set(change.file.read_text().splitlines())


def test_a_language_more_changes_its_lines_alone(tmp_path: Path) -> None:
    file = experiment(tmp_path)
    change = with_language(file, "it")
    assert change.after.languages == ("es", "fr", "it")
    assert change.after.sequence == ("fr", "es", "it")
    assert change.after.evaluate.guard == ("de",)
    assert change.kept == ("es", "fr", "it", "de")
    assert lines(change) == {
        "languages: [es, fr, it] # in the order of the table",
        "evaluate: {guard: [de]}",
        "sequence: [fr, es, it]",
    }
    assert load_experiment(file).languages == ("es", "fr")
    change.write()
    assert load_experiment(file) == change.after


TOUCHED_UP = TEXT.replace("merge: {", "merge: {touch_up: {steps: 5}, ")


def test_a_language_more_is_added_to_a_model_that_is_touched_up(tmp_path: Path) -> None:
    file = experiment(tmp_path, TOUCHED_UP)
    afresh = with_language(file, "it", afresh=True)
    assert afresh.after.merge.added.languages == ()
    change = with_language(file, "it")
    assert change.after.merge.added.languages == ("it",)
    change.write()
    assert with_language(file, "de").after.merge.added.languages == ("it", "de")
    assert with_language(file, "de", afresh=True).after.merge.added.languages == ()
    assert without_language(file, "it").after.merge.added.languages == ()
    assert without_language(file, "es").after.merge.added.languages == ("it",)
    without_language(file, "es").write()
    alone = without_language(file, "fr").after
    assert (alone.languages, alone.merge.added.languages) == (("it",), ())


def test_a_language_may_have_speech_of_its_own(tmp_path: Path) -> None:
    change = with_language(experiment(tmp_path), "nl", {"source": "folder", "path": "data/nl"})
    assert change.after.speech_of("nl").source == "folder"
    assert change.kept == ("es", "fr", "it", "de")


def test_what_yaml_reads_otherwise_is_put_in_quotes(tmp_path: Path) -> None:
    file = experiment(tmp_path, TOUCHED_UP)
    speech = {"source": "datasets", "path": "office/speech", "name": "no", "columns": {"text": "on"}}
    change = with_language(file, "no", speech)
    assert "languages: [es, fr, 'no'] # in the order of the table" in lines(change)
    change.write()
    assert load_experiment(file) == change.after
    assert change.after.merge.added.languages == ("no",)
    assert speech.items() <= change.after.speech_of("no").model_dump(exclude_unset=True).items()
    without_language(file, "no").write()
    assert load_experiment(file).languages == ("es", "fr")


def test_a_language_less_takes_all_that_names_it(tmp_path: Path) -> None:
    change = without_language(experiment(tmp_path), "fr")
    assert change.after.languages == ("es",)
    assert change.after.merge.weights == {"es-translate": 2}
    assert change.after.corpora.overrides == {}
    assert change.after.sequence == ("es",)
    assert change.kept == ("es", "it", "de")


def test_a_language_less_that_others_are_held_on_keeps_its_speech(tmp_path: Path) -> None:
    change = without_language(experiment(tmp_path, TEXT + "finetune: {preserve: {speech: [fr]}}\n"), "fr")
    assert change.after.speech_of("fr").utterances.train == 4  # type: ignore[union-attr]
    assert change.after.merge.weights == {"es-translate": 2}


@pytest.mark.parametrize(
    ("call", "language", "words"),
    [
        (with_language, "es", "has the language es already: `lors run"),
        (with_language, "ESP", "a language code"),
        (without_language, "fx", "has no language 'fx', did you mean 'fr'?"),
        (without_language, "it", "has no language 'it'"),
    ],
)
def test_a_mistake_is_a_sentence(call: object, language: str, words: str, tmp_path: Path) -> None:
    assert callable(call)
    with pytest.raises(ConfigError) as error:
        call(experiment(tmp_path), language)
    assert words in str(error.value)


def test_the_only_language_stays(tmp_path: Path) -> None:
    text = "base: starter\nlanguages: [es]\ncorpora: {source: synthetic}\noutput: OUT\n"
    with pytest.raises(ConfigError, match="the only language"):
        without_language(experiment(tmp_path, text), "es")


def test_a_file_with_a_key_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the key 'sequence' is on line 10 and again on line 12"):
        with_language(experiment(tmp_path, TEXT + "sequence: [es, fr]\n"), "it")


def test_there_must_be_a_model_to_compare_with(tmp_path: Path) -> None:
    file = experiment(tmp_path)
    (tmp_path / "out" / "summary.json").unlink()
    with pytest.raises(InputError, match="has no model that a new one could be compared with"):
        with_language(file, "it")


@pytest.mark.parametrize("change", [with_language, without_language])
def test_the_models_of_several_seeds_are_no_one_model(change: Callable[..., Change], tmp_path: Path) -> None:
    file = experiment(tmp_path, TEXT + "seeds: [0, 1]\n")
    (tmp_path / "out" / "summary.json").unlink()
    with pytest.raises(ConfigError, match=r"has `seeds`, a model for each, .*: change its `languages` and `lors run"):
        change(file, "fr" if change is without_language else "it")


def output(folder: Path, scores: dict[tuple[str, str], float]) -> Path:
    rows = [
        {
            "system": system, "language": language, "task": "translate" if metric == "bleu" else "transcribe",
            "split": "test", "metric": metric, "normaliser": "none" if metric == "bleu" else "lors",
            "value": value if system == "ties" else 50.0, "low": 0.0, "high": 100.0, "p_base": 1.0, "signature": "",
            "utterances": 3, "window": "7.0",
        }
        for system in ("base", "ties")
        for (language, metric), value in scores.items()
    ]  # fmt: skip
    folder.mkdir(parents=True)
    write_results(pd.DataFrame(rows), folder)
    (folder / "summary.json").write_text(json.dumps({"experiment": {"merge": {"method": "ties"}}}))
    return folder


def test_worse_is_more_errors_or_less_bleu_beyond_the_tolerance(tmp_path: Path) -> None:
    before = output(
        tmp_path / "a", {("es", "wer"): 20.0, ("fr", "wer"): 20.0, ("es", "bleu"): 30.0, ("fr", "bleu"): 30.0}
    )
    after = output(
        tmp_path / "b",
        {("es", "wer"): 21.0, ("fr", "wer"): 21.5, ("it", "wer"): 90.0, ("es", "bleu"): 28.0, ("fr", "bleu"): 40.0},
    )
    table, worse = compare_outputs(before, after, ("es", "fr"), 1.0)
    assert worse == ["fr WER", "es BLEU"]
    assert "| es | WER | 20.0 | 21.0 | +1.0 |  |" in table
    assert "| fr | WER | 20.0 | 21.5 | +1.5 | worse |" in table
    assert "| it | WER |  | 90.0 |  |  |" in table
    assert compare_outputs(before, after, ("es", "fr"), 2.0)[1] == []
    assert compare_outputs(before, after, ("es",), 1.0)[1] == ["es BLEU"]
