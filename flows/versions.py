"""The commands `lors history` and `lors rollback`. No Prefect here."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["add_commands"]


def add_commands(add: Callable[..., Any]) -> None:
    """Add the commands to the parser of `flows.cli`."""
    history = add(
        "history",
        _history,
        "Show the versions of a run's output, newest first: what was merged when, and how good it was.",
        "lors history outputs/demo",
    )
    rollback = add(
        "rollback",
        _rollback,
        "Put an earlier version of a run's output back: its model, experts and results; the current one is kept.",
        "lors rollback outputs/demo v1",
    )
    for made in (history, rollback):
        made.add_argument("output", type=Path, metavar="OUTPUT", help="the output folder of a run")
    rollback.add_argument("name", metavar="NAME", help="a version, as `lors history` shows it")


_COLUMNS = ("version", "when (UTC)", "how", "languages", "merged by", "recovery", "mean WER", "mean BLEU")


def _history(options: argparse.Namespace) -> int:
    from lors.versions import history

    versions = history(options.output)
    if options.json:
        print(json.dumps({"versions": versions}, indent=2, ensure_ascii=False))
        return 0
    rows = [_COLUMNS, *map(_row, versions)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
    print("\n* is the current version.")
    return 0


def _rollback(options: argparse.Namespace) -> int:
    from lors.versions import rollback

    output, version = options.output, rollback(options.output, options.name)
    if options.json:
        print(json.dumps(version, indent=2, ensure_ascii=False))
        return 0
    print(
        f"{output} is {version['name']} now, with the model, experts and results of {options.name} "
        f"({_merged(version)}; {', '.join(version['languages'])}). Earlier versions are kept in {output / 'versions'}."
    )
    print(
        f"Its experiment is {output / 'experiment.yaml'}: a scheduled run of another file would merge that file's "
        "languages again."
    )
    return 0


def _row(version: Mapping[str, Any]) -> tuple[str, ...]:
    scores = version["scores"]
    return (
        version["name"] + (" *" if version["current"] else ""),
        version["created"][:16].replace("T", " "),
        version["how"],
        ", ".join(version["languages"]),
        _merged(version),
        _number(scores["recovery"], 2),
        _number(scores["wer"], 1),
        _number(scores["bleu"], 1),
    )


def _merged(version: Mapping[str, Any]) -> str:
    return f"{version['method']} at {version['scaling']:.4g}" + (", touched up" if version.get("touched_up") else "")


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
