"""The table of results, its summary and its Markdown, from small hypotheses tables."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from lors.errors import InputError
from lors.scoring.metrics import METRICS, difference, score
from lors.scoring.results import RESULT_COLUMNS, main_rows, score_tables
from lors.scoring.summary import summarise
from lors.scoring.tables import markdown_table, robustness_table

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
        & (results["normaliser"] == ("none" if part[1] == "translate" else "lors"))
    ]
    assert len(rows) == 1
    return float(rows["value"].iloc[0])


def test_rows_are_tidy_ordered_and_equal_to_score(tables: dict[str, pd.DataFrame], results: pd.DataFrame) -> None:
    assert tuple(results.columns) == RESULT_COLUMNS
    scored = results[results["metric"].isin(METRICS)]
    keys = list(scored[["system", "task", "language", "normaliser", "metric"]].itertuples(index=False, name=None))
    forms = ("lors", "whisper_basic", "none")
    parts = [("transcribe", code, form, m) for code in ("es", "fr") for form in forms for m in ("wer", "cer")]
    parts += [("translate", "es", "none", m) for m in ("bleu", "chrf")]
    assert keys == [(system, *part) for system in tables for part in parts]
    measured = results[
        (results["system"] == "lors") & (results["language"] == "fr") & ~results.index.isin(scored.index)
    ]
    assert list(measured["metric"]) == ["insertions", "long", "compressible", "repeats", "empty", "truncated"]
    assert measured["p_base"].isna().all()
    rows = tables["lors"][(tables["lors"]["language"] == "es") & (tables["lors"]["task"] == "transcribe")]
    expected = score("wer", list(rows["reference"]), list(rows["hypothesis"]), language="es")
    row = scored[(scored["system"] == "lors") & (scored["metric"] == "wer") & (scored["language"] == "es")].iloc[0]
    assert (row["value"], row["low"], row["high"]) == (expected.value, expected.low, expected.high)
    assert (row["signature"], row["utterances"], row["window"]) == (expected.signature, 40, "7.0")
    base = tables["base"][(tables["base"]["language"] == "es") & (tables["base"]["task"] == "transcribe")]
    texts = [list(rows["reference"]), list(rows["hypothesis"]), list(base["hypothesis"])]
    assert row["p_base"] == difference("wer", *texts, language="es").p < 0.01
    assert np.isnan(row["p_task_arithmetic"])  # there is no such system here
    assert results[results["system"] == "base"]["p_base"].isna().all()


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
    assert lacking.pop("recovery_by_task") == {"transcribe": None, "translate": None}
    assert set(lacking.values()) == {None}  # no mean over French alone beside means over both


def test_the_test_split_is_the_one_that_is_summarised(tables: dict[str, pd.DataFrame]) -> None:
    validation = table({ES: 0.9, FR: 0.9, ES_EN: 0.9}, split="validation")
    both = {name: pd.concat([validation, rows]) for name, rows in tables.items()}
    results = score_tables(both)
    assert list(dict.fromkeys(results["split"])) == ["validation", "test"]
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
    assert [cell.startswith("**") for cell in rows["lors"]] == [True, False, False, True, False, True]
    assert rows["base"][-1] == "0.00"
    recovery = summarise(results, tables)["systems"]["lors"]
    assert rows["lors"][-1] == (
        f"**{recovery['recovery']:.2f}** [{recovery['recovery_low']:.2f}, {recovery['recovery_high']:.2f}]"
    )
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
    expected = results[(results.system == "lors") & (results.language == "it") & (results.metric == "wer")].value.iloc[
        0
    ]
    assert summary["guard"]["systems"]["lors"]["wer"] == pytest.approx(expected)
    shown = markdown_table(results, summary)
    assert shown.splitlines()[0].endswith("| recovery | guard it WER | guard de BLEU |")
    assert "worse there than the base beyond the 95 % interval: lors (it transcribe)." in shown
    assert "guard" not in plain
    assert "guard" not in markdown_table(score_tables(tables), plain)


def test_recovery_has_an_interval_a_worst_language_and_parts(
    tables: dict[str, pd.DataFrame], results: pd.DataFrame
) -> None:
    summary = summarise(results, tables)
    for name, expected in (("base", 0), ("experts", 1)):
        own = summary["systems"][name]
        assert (own["recovery"], own["recovery_low"], own["recovery_high"]) == (expected, expected, expected)
    lors, each = summary["systems"]["lors"], summary["recovery_of"]["lors"]
    assert set(each) == {"es transcribe", "es translate"}
    for found in each.values():
        assert found["low"] < found["value"] < found["high"]
    assert lors["recovery_low"] < lors["recovery"] < lors["recovery_high"]
    assert lors["recovery_by_task"] == {
        "transcribe": each["es transcribe"]["value"],
        "translate": each["es translate"]["value"],
    }
    worst = min(each, key=lambda pair: each[pair]["value"])
    assert lors["worst"] == {"recovery": each[worst]["value"], "of": worst}
    assert summary["systems"]["base"]["relative_to_base"] == 0 < lors["relative_to_base"]


def test_the_best_is_named_only_beyond_the_paired_interval(tables: dict[str, pd.DataFrame]) -> None:
    assert summarise(score_tables(tables), tables)["best"] == {
        "es transcribe": "lors",
        "fr transcribe": None,  # ahead, but not beyond the interval
        "es translate": "lors",
    }
    twins = dict(tables, twin=tables["lors"])
    assert set(summarise(score_tables(twins), twins)["best"].values()) == {None}
    several = dict(tables, switched=tables["experts"])  # better than all, but not one model
    assert summarise(score_tables(several), several)["best"]["es transcribe"] == "lors"
    alone = {"base": tables["base"], "experts": tables["experts"]}
    assert set(summarise(score_tables(alone), alone)["best"].values()) == {None}


def test_optional_columns_make_optional_rows(tables: dict[str, pd.DataFrame]) -> None:
    def known(rows: pd.DataFrame) -> pd.DataFrame:
        translated = rows["task"] == "translate"
        return rows.assign(
            spoken="es",
            free=rows["hypothesis"].where(~translated, None),
            comet=np.where(translated, 0.8, np.nan),
            comet_signature="COMET|made-up",
        )

    own = {name: known(rows) for name, rows in tables.items()}
    results = score_tables(own)
    summary = summarise(results, own)
    assert value(results, "lors", ES_EN, "comet") == pytest.approx(80)
    assert summary["systems"]["lors"]["comet"] == pytest.approx(80)
    assert results[results["metric"] == "comet"]["signature"].str.startswith("COMET|made-up|lang:es").all()
    assert summary["robustness"]["lors"]["wrong_language"] == pytest.approx(100 / 3)  # all of the French
    assert value(results, "lors", FR, "free") == value(results, "lors", FR, "wer")
    assert results[results["metric"] == "free"]["signature"].str.startswith("wer|jiwer:").all()
    shown = robustness_table(results, summary)
    assert "| wrong language | free |" in shown.splitlines()[0]
    plain = summarise(score_tables(tables), tables)
    assert plain["robustness"]["lors"]["free"] is None
    assert plain["systems"]["lors"]["comet"] is None
    nulls = {name: rows.assign(spoken=None, free=None, comet=np.nan) for name, rows in tables.items()}
    pd.testing.assert_frame_equal(score_tables(nulls), score_tables(tables))


def test_comet_counts_the_translations_that_have_a_source() -> None:
    rows = table({ES_EN: 0.2})
    scores = np.where(np.arange(40) < 2, 0.8, np.nan)  # a resample in seven meets neither of the two
    systems = {name: rows.assign(comet=scores + more) for name, more in (("base", 0.0), ("task_arithmetic", 0.05))}
    found = score_tables(systems)
    comet = found[found["metric"] == "comet"].set_index("system")
    assert list(comet["utterances"]) == [2, 2]
    assert comet.loc["base", ["value", "low", "high"]].tolist() == pytest.approx([80, 80, 80])
    assert comet.loc["task_arithmetic", "p_base"] == comet.loc["base", "p_task_arithmetic"] < 0.01
    assert comet["signature"].str.startswith("COMET|lang:es").all()


def test_speakers_are_the_blocks_of_every_number(tables: dict[str, pd.DataFrame]) -> None:
    """Also where ids, by which utterances are paired, do not lie in the order of the speakers."""
    spoken = {name: rows.assign(speaker=[f"s{i % 10}" for i in range(len(rows))]) for name, rows in tables.items()}
    spoken["task_arithmetic"] = spoken.pop("average")
    results = score_tables(spoken)
    assert results["signature"].str.endswith("|by:speaker").all()
    wer = results[(results["metric"] == "wer") & (results["normaliser"] == "whisper_basic")]
    row = wer[(wer["system"] == "lors") & (wer["language"] == "fr")].iloc[0]
    texts = {name: rows[(rows["language"] == "fr")] for name, rows in spoken.items()}
    for key, rival in (("p_base", "base"), ("p_task_arithmetic", "task_arithmetic")):
        found = difference(
            "wer",
            *(list(texts[name][kind]) for name, kind in (("lors", "reference"), ("lors", "hypothesis"))),
            list(texts[rival]["hypothesis"]),
            language="fr",
            normaliser="whisper_basic",
            speakers=list(texts["lors"]["speaker"]),
        )
        assert row[key] == found.p
    shuffled = {name: rows.sample(frac=1, random_state=1) for name, rows in spoken.items()}
    assert summarise(score_tables(shuffled), shuffled) == summarise(results, spoken)


@pytest.mark.parametrize("speakers", [False, True])
def test_missing_translations_keep_the_tasks_on_the_same_draws(speakers: bool) -> None:
    """An utterance is as hard in both tasks; independent draws would make the mean's interval 1 / sqrt 2 as wide."""

    def hypotheses(error: float, seed: int, missing: int) -> pd.DataFrame:
        rows = table({ES: error, ES_EN: error}, n=100, seed=seed)
        if speakers:
            rows["speaker"] = [f"s{i % 100 // 5:02d}" for i in range(len(rows))]
        return rows[: len(rows) - missing]

    def width(missing: int) -> float:
        systems = {
            "base": hypotheses(0.6, 0, missing),
            "experts": hypotheses(0.1, 0, missing),
            "lors": hypotheses(0.3, 2, missing),
        }
        lors = summarise(score_tables(systems), systems)["systems"]["lors"]
        return float(lors["recovery_high"] - lors["recovery_low"])

    assert width(5) == pytest.approx(width(0), rel=0.1)


def test_few_speakers_in_one_task_make_utterances_the_blocks_of_both() -> None:
    rows = table({ES: 0.3, ES_EN: 0.3})
    rows["speaker"] = [f"s{i % 40 % 10}" for i in range(len(rows))]
    systems = {"base": rows[(rows["task"] == "transcribe") | (rows["speaker"] != "s9")]}
    assert score_tables(systems)["signature"].str.endswith("|by:utterance").all()


def test_resamples_without_any_utterance_of_a_task_count_for_nothing() -> None:
    """Two of forty utterances have a translation; one resample in seven meets neither."""
    systems = {"base": table({ES: 0.3, ES_EN: 0.3})[:42]}
    found = score_tables(systems)
    row = found[found["metric"] == "chrf"].iloc[0]
    assert row["utterances"] == 2
    assert row["low"] > 0


def test_the_main_rows_are_one_a_system_language_and_task(results: pd.DataFrame) -> None:
    rows = main_rows(results)
    assert len(rows) == 4 * 3
    assert set(zip(rows["task"], rows["metric"], rows["normaliser"], strict=True)) == {
        ("transcribe", "wer", "lors"),
        ("translate", "bleu", "none"),
    }


def test_how_far_the_first_in_recovery_is_ahead_of_each_other(
    tables: dict[str, pd.DataFrame], results: pd.DataFrame
) -> None:
    summary = summarise(results, tables)
    systems, ahead = summary["systems"], summary["ahead"]
    assert ahead["system"] == "lors"  # the experts recover more, but are a model each
    assert set(ahead["by"]) == {"base", "average"}
    for name, by in ahead["by"].items():
        assert by["value"] == pytest.approx(systems["lors"]["recovery"] - systems[name]["recovery"])
        assert 0 < by["low"] < by["value"] < by["high"]
    ends = (ahead["by"]["base"]["low"], ahead["by"]["base"]["high"])
    assert ends == pytest.approx((systems["lors"]["recovery_low"], systems["lors"]["recovery_high"]))
    by = ahead["by"]["average"]
    shown = markdown_table(results, summary)
    assert f"| **{systems['lors']['recovery']:.2f}** [" in shown
    assert f"lors recovers {by['value']:.2f} [{by['low']:.2f}, {by['high']:.2f}] more than average, the next" in shown


def test_differences_in_recovery_are_paired_and_twins_are_not_ahead(tables: dict[str, pd.DataFrame]) -> None:
    twins = dict(tables, twin=tables["lors"])
    results = score_tables(twins)
    summary = summarise(results, twins)
    assert summary["ahead"]["by"]["twin"] == {"value": 0, "low": 0, "high": 0}
    shown = markdown_table(results, summary)
    assert f"| {summary['systems']['lors']['recovery']:.2f} [" in shown
    assert "lors recovers 0.00 [0.00, 0.00] more than twin" in shown
    for names in (("base", "experts"), ("base", "lors")):  # nobody to be ahead of; nothing to recover
        few = {name: tables[name] for name in names}
        assert summarise(score_tables(few), few)["ahead"] is None
