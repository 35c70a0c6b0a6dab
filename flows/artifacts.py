"""What a run shows in the Prefect UI when it ends: its tables, its charts, and where its files are."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
from prefect.logging import get_run_logger

from lors.plots import as_data_uri, recovery_chart, scaling_chart

__all__ = ["create_run_artifacts"]

_FILES = {
    "report.html": "the report",
    "model": "the merged model",
    "experts": "the compact experts",
    "results.csv": "every score",
    "summary.json": "recovery, the search, every step",
    "hypotheses": "what each system said",
}


def create_run_artifacts(output: Path) -> None:
    """Artifacts of the run whose output folder this is; called in a flow run.

    `lors-results` (the tables and the files as Markdown), `lors-scores` (the main scores as rows), `lors-recovery` and
    `lors-scaling` (charts, where there is something to draw) and `lors-report` (a link). A sweep has the Markdown and
    the link. The results are on disk by now, so an API that does not answer is a warning, not an error.
    """
    try:
        _create(output.absolute())
    except Exception as error:
        get_run_logger().warning("the results in %s could not be shown in the UI: %s", output, error)


def _create(output: Path) -> None:
    files = [
        f"- [{name}]({_address(output / name)}): {about}, `{output / name}`"
        for name, about in _FILES.items()
        if (output / name).exists()
    ]
    parts = [f"# {output.name}", (output / "table.md").read_text("utf-8").strip(), "## Files", "\n".join(files)]
    if (output / "robustness.md").is_file():
        parts += ["## Robustness", (output / "robustness.md").read_text("utf-8").strip()]
    create_markdown_artifact("\n\n".join(parts) + "\n", key="lors-results", description=f"Results in {output}")
    report = output / "report.html"
    create_link_artifact(_address(report), link_text=str(report), key="lors-report", description=f"Report of {output}")
    if (output / "summary.json").is_file() and not (output / "sweep.json").is_file():
        _create_charts(output, json.loads((output / "summary.json").read_text("utf-8")))


def _address(path: Path) -> str:
    """Where a browser finds a file: below LORS_FILES_URL, which serves the working folder, or on this machine's disk.

    A browser opens no file of its disk from the UI's page, so the path stands beside the link.
    """
    served = os.environ.get("LORS_FILES_URL")
    if served and path.is_relative_to(Path.cwd()):
        return f"{served.rstrip('/')}/{quote(path.relative_to(Path.cwd()).as_posix())}"
    return path.as_uri()


def _create_charts(output: Path, summary: Mapping[str, Any]) -> None:
    from lors.scoring.files import load_results
    from lors.scoring.results import main_rows

    columns = ["system", "language", "task", "metric", "value", "low", "high", "p_base", "utterances"]
    rows = main_rows(load_results(output))[columns].round({"value": 2, "low": 2, "high": 2, "p_base": 4})
    # JSON has no NaN, and the API refuses it.
    create_table_artifact(
        json.loads(rows.to_json(orient="records")), key="lors-scores", description=f"Main scores of {output}"
    )
    if any(own["recovery"] is not None for own in summary["systems"].values()):
        _create_chart(recovery_chart(summary), "lors-recovery", "Recovery by system: 0 is the base, 1 the experts")
    if curves := {name: curve for name, curve in summary.get("curves", {}).items() if curve["points"]}:
        _create_chart(scaling_chart(curves), "lors-scaling", "Search for the scaling coefficient; filled: the chosen")


def _create_chart(svg: str, key: str, about: str) -> None:
    """As Markdown: the UI prints the whole address of an image artifact, here kilobytes, across the page."""
    create_markdown_artifact(f"![{about}]({as_data_uri(svg)})\n", key=key, description=about)
