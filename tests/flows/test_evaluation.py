"""`lors evaluate` and `lors report` as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import soundfile
from comet_folders import comet_folder
from speech_sounds import utterance

import lors
from flows.cli import main
from lors.scoring.comet import comet_signature
from lors.starter import MODEL_FOLDER


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evaluation")


def run(place: Path, *arguments: str) -> int:
    return main(["evaluate", *arguments, "--store", str(place / "store"), "--set", "resources.threads=1"])


def test_models_side_by_side_and_what_is_kept(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    speech = [
        "--corpus",
        "synthetic",
        "--language",
        "es",
        "--limit",
        "4",
        "--task",
        "transcribe",
        "--task",
        "translate",
    ]
    one, both = place / "one", place / "both"
    assert run(place, "starter", *speech, "--out", str(one)) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("| system | es WER | mean WER | es BLEU | mean BLEU |\n")
    assert "4 steps" not in captured.out
    assert {path.name for path in one.iterdir()} == {
        *("results.csv", "results.parquet", "results.json", "summary.json", "table.md", "robustness.md"),
        *("hypotheses", "report.html"),
    }
    again = ["base=starter", f"copy-of-it={MODEL_FOLDER}", *speech, "--out", str(both), "--json"]
    assert run(place, *again) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["models"] == {"base": "starter", "copy-of-it": str(MODEL_FOLDER)}
    states = {step["name"]: step["state"] for step in summary["steps"]}
    assert states == {
        "prepare es test": "cached",
        "evaluate base es": "cached",
        "evaluate copy-of-it es": "cached",  # the same weights
        "score systems": "run",
    }
    results = lors.load_results(both)
    wer = results[(results.metric == "wer") & (results.normaliser == "lors")].set_index("system")
    assert wer.value["base"] == wer.value["copy-of-it"]
    assert wer.p_base["copy-of-it"] == 1
    assert pd.read_parquet(both / "hypotheses" / "copy-of-it.parquet").spoken.notna().all()


def test_one_table_of_recordings(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = []
    for number, seconds in enumerate((1.0, 1.5)):
        audio = place / f"{number}.wav"
        soundfile.write(audio, utterance(number, seconds).audio(), 16000)
        rows.append({"audio": audio.name, "text": "uno dos"})
    table = place / "calls.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = place / "calls"
    assert run(place, "starter", "--corpus", str(table), "--language", "es", "--out", str(out)) == 0
    capsys.readouterr()
    translate: list[Any] = ["--corpus", str(table), "--language", "es", "--task", "translate", "--out", str(out)]
    assert run(place, "starter", *translate) == 2
    assert "no translation" in capsys.readouterr().err.splitlines()[-1]


def test_comet_stands_beside_bleu(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = comet_folder(place / "comet"), place / "by-comet"
    speech = ["--corpus", "synthetic", "--language", "es", "--limit", "4", "--task", "translate", "--out", str(out)]
    assert run(place, "starter", *speech, "--set", f"evaluate.comet={model}", "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert [step["stage"] for step in summary["steps"]][-2:] == ["score_comet", "score_systems"]
    row = lors.load_results(out).set_index("metric").loc["comet"]
    assert row["value"] == pytest.approx(summary["systems"]["starter"]["comet"])
    assert row["signature"].startswith(comet_signature(model))
    assert run(place, "starter", *speech, "--set", f"evaluate.comet={place}/none") == 2
    assert "holds no COMET model: docs/evaluation.md says how to make one" in capsys.readouterr().err


def test_a_model_that_is_none_is_a_sentence(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(place, str(place / "no-model"), "--corpus", "synthetic", "--language", "es") == 2
    line = capsys.readouterr().err.strip()
    assert line.startswith("lors: ")
    assert "is not a folder" in line
    assert "\n" not in line


def test_the_output_of_a_run_keeps_its_results(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_output = place / "run"
    (run_output / "model").mkdir(parents=True)
    speech = ["--corpus", "synthetic", "--language", "es", "--limit", "1"]
    assert run(place, "starter", *speech, "--out", str(run_output)) == 2
    assert f"{run_output} holds a run's model and its results; give another folder" in capsys.readouterr().err
    assert [path.name for path in run_output.iterdir()] == ["model"]


def test_reports_are_written_anew_and_side_by_side(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, both = place / "one", place / "both"
    before = (one / "report.html").read_text("utf-8")
    (one / "report.html").unlink()
    assert main(["report", str(one)]) == 0
    assert (one / "report.html").read_text("utf-8") == before
    assert main(["report", str(one), str(both), "--out", str(place / "page.html")]) == 0
    assert "copy-of-it" in (place / "page.html").read_text("utf-8")
    capsys.readouterr()
    assert main(["report", str(place / "nowhere")]) == 2
    assert capsys.readouterr().err.startswith("lors: ")
