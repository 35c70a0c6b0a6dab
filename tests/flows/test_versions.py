"""Versions of a real run's output, and the commands for them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from flows_helpers import Done

from flows.cli import main
from flows.pipeline import full_pipeline, sweep
from lors.config import load_experiment
from lors.model_folder import folder_digest
from lors.sweep import Variant


def test_another_scaling_is_a_second_version_and_the_first_comes_back(
    done: Done, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import pipeline

    out = done.folder / "versions"
    first = done.make(merge={"scaling": 0.3}, output=str(out))
    second = done.make(merge={"scaling": 0.6}, output=str(out))
    full_pipeline(first)
    before = folder_digest(out / "model")
    assert load_experiment(out / "experiment.yaml") == first
    full_pipeline(second)
    assert folder_digest(out / "model") != before
    assert load_experiment(out / "experiment.yaml") == second

    assert main(["history", str(out), "--json"]) == 0
    versions = json.loads(capsys.readouterr().out)["versions"]
    assert [(v["name"], v["scaling"], v["current"]) for v in versions] == [("v2", 0.6, True), ("v1", 0.3, False)]
    assert main(["rollback", str(out), "v1"]) == 0
    said = capsys.readouterr().out
    assert f"{out} is v3 now" in said
    assert "v1 (lors at 0.3; es, fr)" in said
    assert f"{out / 'experiment.yaml'}: a scheduled run" in said
    assert folder_digest(out / "model") == before
    assert load_experiment(out / "experiment.yaml") == first
    assert json.loads((out / "summary.json").read_text())["scaling"] == 0.3
    pipeline("automatic-speech-recognition", model=str(out / "model"), device="cpu")

    full_pipeline(first)  # as a schedule would
    assert main(["history", str(out)]) == 0
    table = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    assert table == [["version", "when"], ["v3", "*"], ["v2", table[2][1]], ["v1", table[3][1]], [], ["*", "is"]]
    assert {path.name for path in out.rglob(".*")} == {".lock"}


def test_a_sweep_makes_no_versions(done: Done, capsys: pytest.CaptureFixture[str]) -> None:
    swept = done.folder / "swept"
    sweep([Variant(name="one", changes={}, experiment=done.make(output=str(swept / "one")))], swept)
    assert not {"version.json", "versions"} & {path.name for path in (swept / "one").iterdir()}
    assert main(["history", str(swept / "one")]) == 2
    assert "with a merged model" in capsys.readouterr().err


def test_a_wrong_name_is_the_users(done: Done, capsys: pytest.CaptureFixture[str]) -> None:
    out = done.folder / "out"
    assert main(["rollback", str(out), "V1"]) == 2
    assert capsys.readouterr().err.startswith(f"lors: {out} keeps no version 'V1'")
    assert main(["history", str(done.folder)]) == 2
    assert capsys.readouterr().err.startswith(f"lors: {done.folder} has no summary.json of a run")


@pytest.mark.parametrize("command", [["history"], ["rollback", "v99"]], ids=["history", "rollback"])
def test_the_commands_import_neither_prefect_nor_torch(command: list[str], done: Done, tmp_path: Path) -> None:
    code = "import sys; from flows.cli import main; code = main(sys.argv[1:])\n"
    code += "sys.exit(', '.join({'prefect', 'torch', 'pandas'} & sys.modules.keys()) or code)"
    name, *rest = command
    ended = subprocess.run(
        [sys.executable, "-c", code, name, str(done.folder / "out"), *rest], capture_output=True, text=True
    )
    assert ended.returncode == (0 if name == "history" else 2)
    assert ended.stderr.startswith("lors: " if rest else "")
