"""The report without a browser."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from report_folders import HOSTILE, diagnosis, training, write_run, write_sweep

from lors.errors import InputError
from lors.report import load_run, report_page, write_report
from lors.report.page import LIMIT
from lors.scoring.files import load_results

VOID = {"meta", "br"}


class Document(HTMLParser):
    """The elements of a page, which must close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.files: dict[str, str] = {}
        self.attributes: set[str] = set()
        self.texts: list[str] = []
        self.bold: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.tags.append(tag)
        self.attributes |= set(found)
        if identifier := found.get("id"):
            self.ids.append(identifier)
        if href := found.get("href"):
            self.links.append(href)
            if name := found.get("download"):
                self.files[name] = base64.b64decode(href.partition("base64,")[2]).decode()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self.open and self.open[-1] == "strong":
            self.bold.append(data)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "demo")


SECTIONS = [
    "scores",
    "recovery",
    "guard",
    "robustness",
    "samples",
    "scaling",
    "size",
    "interference",
    "training",
    "cost",
    "settings",
]


def test_a_whole_run_has_every_section_and_needs_nothing_else(run: Path) -> None:
    text = report_page([load_run(run)])
    page = Document(text)
    assert page.ids == SECTIONS
    assert all(link.startswith(("#", "data:text/csv")) for link in page.links)
    assert {link[1:] for link in page.links if link[0] == "#"} <= set(page.ids)
    assert not re.search(r"(https?:)?//\w|@import|url\(", re.sub(r'href="data:[^"]*"', "", text))
    assert "script" not in page.tags
    assert "src" not in page.attributes
    assert not {name for name in page.attributes if name.startswith("on")}
    assert text.count("<svg ") == text.count('role="img" aria-label="')
    assert text.count("<table>") == text.count("<caption>")
    assert "nan" not in re.sub("[a-z]*dominan|inan|nance", "", " ".join(page.texts).lower())


def test_what_a_user_wrote_is_text(run: Path) -> None:
    page = Document(report_page([load_run(run)]))
    assert HOSTILE in page.files["samples.csv"].replace('""', '"')
    assert "".join(HOSTILE.split()) in "".join("".join(page.texts).split())


def test_the_files_in_the_page_are_the_numbers_of_the_run(run: Path) -> None:
    files = Document(report_page([load_run(run)])).files
    assert files["results.csv"] == (run / "results.csv").read_text()
    pd.testing.assert_frame_equal(
        pd.read_csv(io.StringIO(files["training.csv"])), pd.read_csv(run / "training.csv"), check_dtype=False
    )
    scaling = pd.read_csv(io.StringIO(files["scaling.csv"]))
    assert scaling["value"].tolist() == [40.0, 35.0, 38.0, 34.0] * 2
    summary = json.loads((run / "summary.json").read_text())
    recovery = pd.read_csv(io.StringIO(files["recovery.csv"])).query("of == 'mean'").set_index("system")["recovery"]
    assert recovery["lors"] == pytest.approx(summary["systems"]["lors"]["recovery"], rel=1e-12)
    assert {"guard.csv", "robustness.csv", "sizes.csv", "steps.csv", "data.csv", "diagnosis-pairs.csv"} <= set(files)


def test_bold_is_only_what_the_intervals_support(run: Path, tmp_path: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    for best, count in (({"es transcribe": "lors", "fr transcribe": None}, 1), ({}, 0)):
        given = load_run(run)
        given.summary.update(best=best, ahead=None)  # type: ignore[attr-defined]
        bold = [text for text in Document(report_page([given])).bold if re.fullmatch(r"[\d.]+", text)]
        assert len(bold) == count
    rows = load_results(run)
    value = rows.query("system == 'lors' and language == 'es' and metric == 'wer' and normaliser == 'lors'")["value"]
    given.summary["best"] = {"es transcribe": "lors"}  # type: ignore[index]
    assert f"{value.item():.1f}" in Document(report_page([given])).bold
    assert summary["best"]


def test_the_first_in_recovery_is_said_to_be_and_is_bold_only_where_it_is_ahead_of_all(run: Path) -> None:
    given, ends = load_run(run), {"value": 0.5, "high": 0.75}
    for low, bold in ((0.25, ["0.90"]), (-0.25, [])):
        given.summary.update(  # type: ignore[attr-defined]
            best={},
            ahead={"system": "lors", "by": {"base": ends | {"low": 0.25}, "task_arithmetic": ends | {"low": low}}},
        )
        given.systems["lors"]["recovery"] = 0.9
        text = report_page([given])
        page = Document(text)
        assert [own for own in page.bold if re.fullmatch(r"[\d.]+", own)] == bold
        assert "lors recovers 0.50 [0.25, 0.75] more than base, the next single model." in text
        assert "less than lors" in text


def test_a_training_of_several_experts_costs_once(run: Path) -> None:
    given = load_run(run)
    prepared, trained = given.summary["steps"]
    for again in ("run", "cached"):  # as it was said before, and now
        given.summary.update(steps=[prepared, trained, {**trained, "name": "again", "state": again}])  # type: ignore[attr-defined]
        page = Document(report_page([given]))
        assert "1 of 2 steps ran, 5.0 min of computing in 93.5 s by the clock." in " ".join(page.texts)
        assert pd.read_csv(io.StringIO(page.files["steps.csv"]))["name"].tolist()[1:] == [trained["name"], "again"]


def test_a_section_is_there_only_with_its_data(run: Path, tmp_path: Path) -> None:
    """As `lors evaluate` leaves it, and as runs of before these keys did."""
    folder = tmp_path / "old"
    folder.mkdir()
    old = load_results(run).query("normaliser != 'whisper_basic' and metric in ['wer', 'cer', 'bleu', 'chrf']")
    old = old[(old["normaliser"] == "lors") | (old["task"] == "translate")]
    old.drop(columns=["normaliser", "p_base", "p_task_arithmetic"]).to_csv(folder / "results.csv", index=False)
    given = json.loads((run / "summary.json").read_text())
    kept = ("recovery", "ratio_to_expert", "wer", "cer", "bleu", "chrf")
    systems = {name: {key: own[key] for key in kept} for name, own in given["systems"].items()}
    (folder / "summary.json").write_text(json.dumps({"systems": systems, "recovery_left_out": []}))
    page = Document(report_page([load_run(folder)]))
    assert page.ids == ["scores", "recovery"]
    assert page.bold == []
    old_curve = {"scaling": 0.1, "points": [{"scaling": 0.1, "error": 40.5, "errors": {"es-transcribe": 40.5}}]}
    curves = {"lors": old_curve, "fixed": {"scaling": 1.0, "points": []}}
    systems = {name: {**own, "recovery": None} for name, own in systems.items()}
    (folder / "summary.json").write_text(json.dumps({"systems": systems, "curves": curves}))
    page = Document(report_page([load_run(folder)]))
    assert page.ids == ["scores", "scaling"]
    assert "40.5" in page.files["scaling.csv"]


def test_a_large_run_stays_below_five_megabytes(tmp_path: Path) -> None:
    languages = tuple("ca de es fr id it nl pt sv tr".split())
    folder = write_run(tmp_path / "large", languages=languages, guard=(), utterances=20)
    experts = [f"{language}-{task}" for language in languages for task in ("transcribe", "translate")]
    (folder / "diagnosis.json").write_text(json.dumps(diagnosis(experts, layers=70)))
    (folder / "training.csv").write_text(training(experts, 3000))
    write_report([folder], tmp_path / "new" / "report.html")
    written = (tmp_path / "new" / "report.html").stat().st_size
    assert 400_000 < written < 5_000_000
    page = Document((tmp_path / "new" / "report.html").read_text())
    assert page.ids == SECTIONS[:2] + SECTIONS[3:]
    assert "results.csv" in page.files


def test_what_does_not_fit_is_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = report_page([load_run(run)])
    assert "Left out" not in whole
    monkeypatch.setattr("lors.report.page.LIMIT", 150_000)
    small = report_page([load_run(run)])
    assert "Left out to keep this page" in small
    assert len(small.encode()) < 150_000 < len(whole.encode()) < LIMIT
    assert Document(small).ids == SECTIONS
    assert "results.csv" in Document(small).files


def test_runs_stand_side_by_side(tmp_path: Path, run: Path) -> None:
    sweep = write_sweep(tmp_path / "sweep")
    write_report([sweep], tmp_path / "report.html")
    page = Document((tmp_path / "report.html").read_text())
    assert {"run-1", "run-2", "scores-1", "scores-2"} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    table = pd.read_csv(io.StringIO(page.files["comparison.csv"]))
    assert table["prune.rank_ratio"].tolist() == [0.05] * 5 + [0.1] * 5
    assert set(table["seed"]) == {3}
    write_report([sweep / "rank_ratio=0.05", run], tmp_path / "two.html")  # no sweep: the settings that differ
    two = pd.read_csv(io.StringIO(Document((tmp_path / "two.html").read_text()).files["comparison.csv"]))
    assert two.columns[:3].tolist() == ["run", "prune.rank_ratio", "system"]
    assert two.drop_duplicates("run")["prune.rank_ratio"].tolist() == [0.05, 0.1]


def test_a_wrong_folder_is_the_users_mistake(tmp_path: Path, run: Path) -> None:
    with pytest.raises(InputError, match="no folder"):
        load_run(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no results"):
        load_run(tmp_path)
    load_results(run).to_csv(tmp_path / "results.csv", index=False)
    with pytest.raises(InputError, match=r"summary\.json"):
        load_run(tmp_path)
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(InputError, match="names no systems"):
        load_run(tmp_path)
