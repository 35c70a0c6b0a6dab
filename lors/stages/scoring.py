"""All scores of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lors.files import write_json
from lors.stages.common import HYPOTHESES, Report, use

__all__ = ["score_comet", "score_systems"]

_COMET = "comet.parquet"


def score_comet(
    inputs: Mapping[str, str], places: Mapping[str, Any], out: str, threads: int, report: Report, **_: Any
) -> dict[str, Any]:
    """COMET's score of each translation whose source is known, by id."""
    import pandas as pd

    from lors.scoring.comet import comet_scores, comet_signature

    use(threads)
    folder = Path(places["comet"])
    table = pd.read_parquet(Path(inputs["hypotheses"]) / HYPOTHESES)
    rows = table[(table["task"] == "translate") & table["source"].notna()]
    texts = [rows[name].tolist() for name in ("source", "hypothesis", "reference")]
    scores = comet_scores(
        folder,
        *texts,
        on_progress=lambda done, total: report({"done": done, "total": total, "unit": "translations"}),
    )
    found = pd.DataFrame(
        {"id": rows["id"], "task": "translate", "comet": scores, "comet_signature": comet_signature(folder)}
    )
    found.to_parquet(Path(out) / _COMET, index=False)
    return {"translations": len(found)}


def score_systems(settings: Mapping[str, Any], inputs: Mapping[str, str], out: str, **_: Any) -> dict[str, Any]:
    """The results, the summary by system, and the tables, from the hypotheses of `SYSTEM/...` inputs."""
    import pandas as pd

    from lors.scoring.files import write_results
    from lors.scoring.results import score_tables
    from lors.scoring.summary import summarise
    from lors.scoring.tables import markdown_table, robustness_table

    parts: dict[str, list[pd.DataFrame]] = {}
    for name in settings["order"]:
        table = pd.read_parquet(Path(inputs[name]) / HYPOTHESES)
        if comet := inputs.get(f"comet {name}"):
            table = table.merge(pd.read_parquet(Path(comet) / _COMET), on=["id", "task"], how="left")
        parts.setdefault(name.partition("/")[0], []).append(table)
    tables = {system: pd.concat(found, ignore_index=True) for system, found in parts.items()}
    results = score_tables(tables, normaliser=settings["normaliser"])
    summary = summarise(results, tables, guard=settings["guard"], normaliser=settings["normaliser"])
    folder = Path(out)
    write_results(results, folder)
    write_json(folder / "summary.json", summary)
    (folder / "table.md").write_text(markdown_table(results, summary), encoding="utf-8")
    (folder / "robustness.md").write_text(robustness_table(results, summary), encoding="utf-8")
    for system, table in tables.items():
        table.to_parquet(folder / f"hypotheses-{system}.parquet", index=False)
    return {"systems": list(tables)}
