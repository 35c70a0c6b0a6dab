"""All scores of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lors.stages.common import HYPOTHESES
from lors.store import write_json

__all__ = ["score_systems"]


def score_systems(settings: Mapping[str, Any], inputs: Mapping[str, str], out: str, **_: Any) -> dict[str, Any]:
    """results.csv, the summary by system, and the table, from the hypotheses of `SYSTEM-...` inputs."""
    import pandas as pd

    from lors.scoring.results import markdown_table, score_tables, summarise

    parts: dict[str, list[Any]] = {}
    for name in settings["order"]:
        parts.setdefault(name.partition("-")[0], []).append(pd.read_parquet(Path(inputs[name]) / HYPOTHESES))
    tables = {system: pd.concat(found, ignore_index=True) for system, found in parts.items()}
    results = score_tables(tables, normaliser=settings["normaliser"])
    summary = summarise(results, tables, guard=settings["guard"], normaliser=settings["normaliser"])
    results.to_csv(Path(out) / "results.csv", index=False)
    write_json(Path(out) / "summary.json", summary)
    (Path(out) / "table.md").write_text(markdown_table(results, summary), encoding="utf-8")
    for system, table in tables.items():
        table.to_parquet(Path(out) / f"hypotheses-{system}.parquet", index=False)
    return {"systems": list(tables)}
