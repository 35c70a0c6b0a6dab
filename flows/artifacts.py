"""What a run shows in the Prefect UI when it ends: its tables, its charts, and where its files are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefect.artifacts import (
    create_image_artifact,
    create_link_artifact,
    create_markdown_artifact,
    create_table_artifact,
)
from prefect.logging import get_run_logger

from lors.plots import as_data_uri, recovery_chart, scaling_chart

__all__ = ["create_run_artifacts"]


def create_run_artifacts(output: Path) -> None:
    """Artifacts of the run whose output folder this is; called in a flow run.

    `lors-results` (the tables as Markdown), `lors-scores` (the main scores as rows), `lors-recovery` and `lors-scaling`
    (charts, where there is something to draw) and `lors-report` (a link). A sweep has the Markdown and the link. The
    results are on disk by now, so an API that does not answer is a warning, not an error.
    """
    try:
        _create(output.absolute())
    except Exception as error:
        get_run_logger().warning("the results in %s could not be shown in the UI: %s", output, error)


def _create(output: Path) -> None:
    report = (output / "report.html").as_uri()
    files = [f"- [{path.name}]({path.as_uri()})" for path in sorted(output.glob("results.*"))]
    parts = [f"# {output.name}", (output / "table.md").read_text("utf-8").strip()]
    if (output / "robustness.md").is_file():
        parts += ["## Robustness", (output / "robustness.md").read_text("utf-8").strip()]
    parts += ["## Files", "\n".join([f"- [report.html]({report})", *files])]
    create_markdown_artifact("\n\n".join(parts) + "\n", key="lors-results", description=f"Results in {output}")
    create_link_artifact(report, link_text="report.html", key="lors-report", description=f"The report of {output}")
    if (output / "summary.json").is_file() and not (output / "sweep.json").is_file():
        _create_charts(output, json.loads((output / "summary.json").read_text("utf-8")))


def _create_charts(output: Path, summary: Mapping[str, Any]) -> None:
    from lors.scoring.files import load_results
    from lors.scoring.results import main_rows

    columns = ["system", "language", "task", "metric", "value", "low", "high", "p_base", "utterances"]
    rows = main_rows(load_results(output))[columns].round(4)
    # JSON has no NaN, and the API refuses it.
    create_table_artifact(
        json.loads(rows.to_json(orient="records")), key="lors-scores", description=f"Main scores of {output}"
    )
    if any(own["recovery"] is not None for own in summary["systems"].values()):
        picture = as_data_uri(recovery_chart(summary))
        create_image_artifact(picture, key="lors-recovery", description="Recovery by system")
    if curves := {name: curve for name, curve in summary.get("curves", {}).items() if curve["points"]}:
        picture = as_data_uri(scaling_chart(curves))
        create_image_artifact(picture, key="lors-scaling", description="Search for the scaling coefficient")
