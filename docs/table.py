"""Prints the table of docs/results.md from a run's output: `python docs/table.py outputs/demo`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from lors import load_results
from lors.scoring.metrics import main_metric
from lors.scoring.results import main_rows


def main(output: Path) -> None:
    """One row a system: the main metric of each language and task with its 95 % interval, recovery, the guard's.

    Experts have none for a guard language.
    """
    results = main_rows(load_results(output))
    summary = json.loads((output / "summary.json").read_text("utf-8"))
    watched = summary.get("guard", {}).get("languages", [])
    columns = sorted(
        {(row.task, row.language) for row in results.itertuples()}, key=lambda own: (own[1] in watched, own)
    )
    heads = [f"{language} {main_metric(task, language).upper()}" for task, language in columns]
    trained = sum(language not in watched for _, language in columns)
    heads = ["system", *heads[:trained], "recovery", *(f"guard {head}" for head in heads[trained:])]
    print("| " + " | ".join(heads) + " |")
    print("| --- " * (len(columns) + 2) + "|")
    for system, means in summary["systems"].items():
        cells = [system]
        for task, language in columns:
            chosen = (results.system == system) & (results.language == language)
            rows = results[chosen & (results.task == task)].itertuples()
            cells += [f"{row.value:.1f} ({row.low:.1f} to {row.high:.1f})" for row in rows] or ["-"]
        value, low, high = (means.get(name) for name in ("recovery", "recovery_low", "recovery_high"))
        span = "" if low is None or low == high else f" ({low:.2f} to {high:.2f})"
        cells.insert(trained + 1, "-" if value is None else f"{value:.2f}{span}")
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
