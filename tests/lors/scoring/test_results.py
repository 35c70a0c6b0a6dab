"""The table of results, its summary and its Markdown, from small hypotheses tables."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from lors.errors import InputError
from lors.scoring.metrics import score
from lors.scoring.results import RESULT_COLUMNS, markdown_table, score_tables, summarise

WORDS = ("uno", "dos", "tres", "cuatro", "cinco", "seis", "siete", "ocho")
Part = tuple[str, str]


def table(
    errors: dict[Part, float], n: int = 40, window: tuple[float, ...] = (7.0,), split: str = "test", seed: int = 0
) -> pd.DataFrame:
    """Hypotheses with a share of wrong words a (language, task); the same references for every system."""
    rows: list[dict[str, object]] = []
    for (language, task), error in errors.items():
        texts, noise = np.random.default_rng(1), np.random.default_rng(seed)
        for i in range(n):
            words = [str(word) for word in texts.choice(WORDS, 8)]
            heard = ["mal" if noise.random() < error else word for word in words]
            rows.append(
                {
                    "id": f"u{i:03d}",
                    "language": language,
                    "task": task,
                    "split": split,
                    "speaker": None,
                    "seconds": 2.0,
                    "reference": " ".join(words),
                    "hypothesis": " ".join(heard),
                    "window": window[i % len(window)],
                    "tokens": 9,
                    "truncated": False,
                }
            )
    return pd.DataFrame(rows)


ES, FR, ES_EN = ("es", "transcribe"), ("fr", "transcribe"), ("es", "translate")


@pytest.fixture(scope="module")
def tables() -> dict[str, pd.DataFrame]:
    return {
        "base": table({ES: 0.6, FR: 0.3, ES_EN: 0.5}),
        "experts": table({ES: 0.1, FR: 0.3, ES_EN: 0.1}),  # the French expert is the base
        "lors": table({ES: 0.2, FR: 0.2, ES_EN: 0.2}, seed=2),
        "average": table({ES: 0.4, FR: 0.4, ES_EN: 0.4}, seed=3),
    }


@pytest.fixture(scope="module")
def results(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    return score_tables(tables)


def value(results: pd.DataFrame, system: str, part: Part, metric: str) -> float:
    rows = results[
        (results["system"] == system)
        & (results["language"] == part[0])
        & (results["task"] == part[1])
        & (results["metric"] == metric)
    ]
    assert len(rows) == 1
    return float(rows["value"].iloc[0])


def test_rows_are_tidy_ordered_and_equal_to_score(tables: dict[str, pd.DataFrame], results: pd.DataFrame) -> None:
    assert tuple(results.columns) == RESULT_COLUMNS
    keys = list(results[["system", "task", "language", "metric"]].itertuples(index=False, name=None))
    parts = [("transcribe", "es", m) for m in ("wer", "cer")] + [("transcribe", "fr", m) for m in ("wer", "cer")]
    parts += [("translate", "es", m) for m in ("bleu", "chrf")]
    assert keys == [(system, *part) for system in tables for part in parts]
    rows = tables["lors"][(tables["lors"]["language"] == "es") & (tables["lors"]["task"] == "transcribe")]
    expected = score("wer", list(rows["reference"]), list(rows["hypothesis"]), language="es")
    row = results[(results["system"] == "lors") & (results["metric"] == "wer") & (results["language"] == "es")].iloc[0]
    assert (row["value"], row["low"], row["high"]) == (expected.value, expected.low, expected.high)
    assert (row["signature"], row["utterances"], row["window"]) == (expected.signature, 40, "7.0")


def test_the_order_of_utterances_and_languages_in_a_table_does_not_matter(
    tables: dict[str, pd.DataFrame], results: pd.DataFrame
) -> None:
    shuffled = {name: rows.sample(frac=1, random_state=0) for name, rows in tables.items()}
    pd.testing.assert_frame_equal(score_tables(shuffled), results)


def test_windows_are_written_as_one_or_a_range() -> None:
    assert set(score_tables({"base": table({ES: 0.1}, n=4, window=(4.0,))})["window"]) == {"4.0"}
    assert set(score_tables({"base": table({ES: 0.1}, n=4, window=(12.5, 7.0, 9.25))})["window"]) == {"7.0-12.5"}


def test_summary_by_hand(tables: dict[str, pd.DataFrame], results: pd.DataFrame) -> None:
    summary = summarise(results, tables)
    assert summary["recovery_left_out"] == ["fr transcribe"]
    assert summary["systems"]["base"]["recovery"] == 0
    assert summary["systems"]["experts"]["recovery"] == 1
    assert summary["systems"]["experts"]["ratio_to_expert"] == 1
    lors = summary["systems"]["lors"]
    each = []
    for part, metric in ((ES, "wer"), (ES_EN, "bleu")):
        base, system, expert = (value(results, name, part, metric) for name in ("base", "lors", "experts"))
        each.append((base - system) / (base - expert))
    assert lors["recovery"] == pytest.approx(sum(each) / 2)
    assert 0 < lors["recovery"] < 1
    assert lors["wer"] == pytest.approx((value(results, "lors", ES, "wer") + value(results, "lors", FR, "wer")) / 2)
    assert lors["bleu"] == value(results, "lors", ES_EN, "bleu")
    ratios = [value(results, "experts", part, "wer") / value(results, "lors", part, "wer") for part in (ES, FR)]
    ratios.append(value(results, "lors", ES_EN, "bleu") / value(results, "experts", ES_EN, "bleu"))
    assert lors["ratio_to_expert"] == pytest.approx(sum(ratios) / 3)
    assert json.loads(json.dumps(summary)) == summary


def test_summary_without_a_reference_system_or_a_language(tables: dict[str, pd.DataFrame]) -> None:
    alone = {name: tables[name] for name in ("base", "lors")}
    summary = summarise(score_tables(alone), alone)
    assert summary["recovery_left_out"] == []
    assert [system["recovery"] for system in summary["systems"].values()] == [None, None]
    assert summary["systems"]["lors"]["wer"] is not None
    partial = dict(tables, lors=tables["lors"][tables["lors"]["language"] == "fr"])
    lacking = summarise(score_tables(partial), partial)["systems"]["lors"]
    assert set(lacking.values()) == {None}  # no mean over French alone beside means over both


def test_the_test_split_is_the_one_that_is_summarised(tables: dict[str, pd.DataFrame]) -> None:
    validation = table({ES: 0.9, FR: 0.9, ES_EN: 0.9}, split="validation")
    both = {name: pd.concat([validation, rows]) for name, rows in tables.items()}
    results = score_tables(both)
    assert list(results["split"].iloc[:4]) == ["validation", "validation", "test", "test"]
    assert summarise(results, both) == summarise(score_tables(tables), tables)
    only = {"base": validation}
    assert summarise(score_tables(only), only)["systems"]["base"]["wer"] > 80
    assert "Split validation" in markdown_table(score_tables(only), summarise(score_tables(only), only))


def test_unspaced_languages_are_judged_by_cer() -> None:
    zh = ("zh", "transcribe")
    systems = {"base": table({ES: 0.5, zh: 0.5}), "experts": table({ES: 0.1, zh: 0.1})}
    results = score_tables(systems)
    summary = summarise(results, systems)["systems"]["base"]
    assert summary["wer"] == value(results, "base", ES, "wer")
    assert summary["cer"] == pytest.approx((value(results, "base", ES, "cer") + value(results, "base", zh, "cer")) / 2)
    header = markdown_table(results, summarise(results, systems)).splitlines()[0]
    assert header == "| system | es WER | zh CER | mean WER | mean CER | recovery |"


def test_markdown_marks_the_best_that_is_not_an_expert(tables: dict[str, pd.DataFrame], results: pd.DataFrame) -> None:
    text = markdown_table(results, summarise(results, tables))
    lines = text.splitlines()
    assert lines[0] == "| system | es WER | fr WER | mean WER | es BLEU | mean BLEU | recovery |"
    rows = {
        cells[1].strip(): [cell.strip() for cell in cells[2:-1]] for cells in (line.split("|") for line in lines[2:6])
    }
    assert list(rows) == list(tables)
    assert rows["lors"][0] == f"**{value(results, 'lors', ES, 'wer'):.1f}**"
    assert rows["experts"][0] == f"{value(results, 'experts', ES, 'wer'):.1f}"
    assert all(cell.startswith("**") for cell in rows["lors"])
    assert rows["base"][-1] == "0.00"
    assert "jiwer:4" in text
    assert "BLEU|nrefs:1" in text
    assert "fr transcribe" in text
    assert "lang:" not in text
    assert "not all given the same window" not in text


def test_markdown_of_gaps_other_windows_and_odd_names(tables: dict[str, pd.DataFrame]) -> None:
    odd = {"base": tables["base"], "a|b": table({ES: 0.1}, window=(9.0,))}
    text = markdown_table(score_tables(odd), summarise(score_tables(odd), odd))
    assert "| a\\|b | **" in text
    assert "| - |" in text
    assert "not all given the same window" in text


def test_tables_that_do_not_compare_are_refused(tables: dict[str, pd.DataFrame]) -> None:
    base = tables["base"]
    with pytest.raises(
        InputError, match=r"'lors' and 'base' have different utterances or references for es transcribe"
    ):
        score_tables({"base": base, "lors": tables["lors"].iloc[1:]})
    changed = tables["lors"].assign(reference=tables["lors"]["reference"].str.replace("uno", "una"))
    with pytest.raises(InputError, match=r"different utterances or references"):
        score_tables({"base": base, "lors": changed})
    with pytest.raises(InputError, match=r"'u000' twice in es transcribe"):
        score_tables({"base": pd.concat([base, base.iloc[:1]])})
    with pytest.raises(InputError, match=r"no column window"):
        score_tables({"base": base.drop(columns="window")})
    with pytest.raises(InputError, match=r"the task 'asr'"):
        score_tables({"base": base.assign(task="asr")})
    with pytest.raises(InputError, match=r"no reference for 40 of 40"):
        score_tables({"base": base.assign(reference=None)})
    with pytest.raises(InputError, match=r"no hypotheses to score"):
        score_tables({"base": base.iloc[:0]})


IT, DE_EN = ("it", "transcribe"), ("de", "translate")


def test_guard_languages_show_forgetting_and_have_no_part_in_the_means(tables: dict[str, pd.DataFrame]) -> None:
    guards = {
        "base": table({IT: 0.2, DE_EN: 0.2}),
        "lors": table({IT: 0.6, DE_EN: 0.2}),  # forgets one, and keeps the other word for word
        "average": table({IT: 0.0, DE_EN: 0.05}),
    }
    watched = {name: pd.concat([own, guards[name]]) if name in guards else own for name, own in tables.items()}
    results = score_tables(watched)
    summary = summarise(results, watched, guard=["it", "de"])
    plain = summarise(score_tables(tables), tables)
    assert summary["systems"] == plain["systems"]
    assert summary["recovery_left_out"] == plain["recovery_left_out"]
    assert summary["guard"]["languages"] == ["it", "de"]
    assert {name: own["forgotten"] for name, own in summary["guard"]["systems"].items()} == {
        "base": [],
        "lors": ["it transcribe"],
        "average": [],
    }
    expected = results[(results.system == "lors") & (results.language == "it") & (results.metric == "wer")].value.item()
    assert summary["guard"]["systems"]["lors"]["wer"] == pytest.approx(expected)
    shown = markdown_table(results, summary)
    assert shown.splitlines()[0].endswith("| recovery | guard it WER | guard de BLEU |")
    assert "worse there than the base beyond the 95 % interval: lors (it transcribe)." in shown
    assert "guard" not in plain
    assert "guard" not in markdown_table(score_tables(tables), plain)
