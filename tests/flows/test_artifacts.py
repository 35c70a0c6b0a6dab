"""What a run shows in Prefect's API when it has ended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from report_folders import write_run

from flows.artifacts import create_run_artifacts
from lors.report import write_report


def shown(key: str, about: str) -> Any:
    """The artifact of a key whose description ends so."""
    with get_client(sync_client=True) as client:
        query = {"artifacts": {"key": {"any_": [key]}}}
        found = client.request("POST", "/artifacts/filter", json=query).json()
    [data] = [artifact["data"] for artifact in found if artifact["description"].endswith(about)]
    return data


@pytest.fixture
def output(tmp_path: Path) -> Path:
    folder = write_run(tmp_path / "my runs" / "demo")
    write_report([folder], folder / "report.html")
    (folder / "table.md").write_text("| system | mean WER |\n| --- | ---: |\n")
    return folder


def test_a_run_shows_its_table_its_files_and_its_charts(prefect_api: str, output: Path) -> None:
    create_run_artifacts(output)
    text = shown("lors-results", str(output))
    assert text.startswith("# demo\n\n| system |")
    assert f"- [report.html]({(output / 'report.html').as_uri()}): the report, `{output}/report.html`\n" in text
    assert f"`{output}/results.csv`" in text
    assert "`{output}/missing`" not in text
    assert shown("lors-report", str(output)) == f"[{output}/report.html]({(output / 'report.html').as_uri()})"
    rows = json.loads(shown("lors-scores", str(output)))
    assert rows[0].keys() >= {"system", "language", "task", "metric", "value"}
    assert all(row["value"] == round(row["value"], 2) for row in rows)


def test_links_lead_to_where_the_working_folder_is_served(
    prefect_api: str, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORS_FILES_URL", "https://files.example.org/speech/")
    create_run_artifacts(Path("my runs/demo"))
    address = "https://files.example.org/speech/my%20runs/demo/report.html"
    assert shown("lors-report", str(output)) == f"[{output}/report.html]({address})"
