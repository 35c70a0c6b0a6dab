"""Prints the growth table of docs/results.md from the outputs of runs of one more language each:
`python docs/growth_study.py outputs/three outputs/four`.

Seconds are those of the steps when they were computed, one after the other. `own` is the last language's own work:
its speech, training, pruning, and its and the base's evaluation. `on top` is what else the finished model takes: adding
it, the touch-up of all languages, the evaluation of the new model on all of them. Comparisons with other systems are no
part of either.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

HEADS = ("languages", "cosine", "sign conflict", "own s", "on top s", "cost", "all trainings s")


def main(outputs: list[Path]) -> None:
    """One row an output: recovery by system, the experts' mean conflict over pairs, seconds."""
    found = [(path, json.loads((path / "summary.json").read_text("utf-8"))) for path in outputs]
    systems = list(dict.fromkeys(name for _, summary in found for name in summary["systems"] if name != "base"))
    systems.remove("experts")
    heads = [HEADS[0], *systems, *HEADS[1:]]
    print("| " + " | ".join(heads) + " |")
    print("| --- |" + " ---: |" * (len(heads) - 1))
    for path, summary in found:
        cells = [f"{len(summary['experiment']['languages'])}, with {_last(summary)}"]
        cells += [_recovery(summary["systems"].get(name, {})) for name in systems]
        cells += [*_conflict(path / "diagnosis.json"), *_seconds(summary)]
        print("| " + " | ".join(cells) + " |")


def _last(summary: Mapping[str, Any]) -> str:
    return str(summary["experiment"]["languages"][-1])


def _recovery(means: Mapping[str, Any]) -> str:
    if means.get("recovery") is None:
        return "-"
    return f"{means['recovery']:.2f} [{means['recovery_low']:.2f}, {means['recovery_high']:.2f}]"


def _conflict(diagnosis: Path) -> list[str]:
    if not diagnosis.is_file():
        return ["-", "-"]
    pairs = [row for row in json.loads(diagnosis.read_text("utf-8"))["pairs"] if row["level"] == "model"]
    return [f"{fmean(row[name] for row in pairs):.2f}" if pairs else "-" for name in ("cosine", "sign_conflict")]


def _seconds(summary: Mapping[str, Any]) -> list[str]:
    last = _last(summary)
    own = ("prepare", "fine-tune", "extract", "prune", "evaluate expert", "evaluate switched", "evaluate base")
    trained = _total(summary, lambda name, words: name.startswith(own) and words & {last, *_experts(summary)})
    put = {f"add {last}", f"touch up {last}"}
    if not any(step["name"] in put for step in summary["steps"]):
        put = {"touch up"}
    more = _total(summary, lambda name, words: name in put or name.startswith("evaluate touched_up"))
    everything = _total(summary, lambda name, words: name.startswith(("fine-tune", "touch up")))
    return [f"{trained:.0f}", f"{more:.0f}", f"{1 + more / trained:.2f}", f"{everything:.0f}"]


def _experts(summary: Mapping[str, Any]) -> set[str]:
    return {f"{_last(summary)}-{task}" for task in summary["experiment"]["tasks"]}


def _total(summary: Mapping[str, Any], counts: Any) -> float:
    """The seconds of the steps that count, each key once: experts of one language may be one training."""
    steps: Iterable[Mapping[str, Any]] = summary["steps"]
    found = {s["key"]: s["seconds"] for s in steps if counts(s["name"], set(s["name"].split()))}
    return sum(found.values())


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
