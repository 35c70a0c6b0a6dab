"""The commands on speech: `lors data check`. No Prefect here."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lors.speech.data_check import DataReport

__all__ = ["add_commands"]

_CHECK = """\
Prepare the speech of an experiment as a run would, and say what is wrong with it before anything is trained:
hours, durations, speakers, overlaps between splits, texts that cannot belong to their audio, what the base's
tokenizer cannot write, rejected rows, clipped and quiet audio.

Errors are what a run would stop at: a split that is missing, empty or mostly bad, a train split without any
translation where translate is a task, audio longer than the window. Warnings (test speakers or sentences that were
heard in training, misfits, ...) and notes let a run go on. What was prepared is kept in the store for the run."""

_EXAMPLES = """\
for example:
  lors data check deployments/demo.yaml
  lors data check deployments/demo.yaml --set corpora.limits.train=500 --out check --json

exit code: 0, 1 where there is an error, 2 where the experiment itself is wrong"""


def add_commands(add: Callable[..., Any]) -> None:
    """Add the commands to the parser of `flows.cli`."""
    group = add("data", _check, "Examine the speech of an experiment.", "lors data check deployments/demo.yaml")
    check = group.add_subparsers(title="commands", metavar="COMMAND", required=True).add_parser(
        "check",
        help="what is wrong with the speech of an experiment, before anything is trained",
        description=_CHECK,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    check.add_argument("file", type=Path, metavar="FILE", help="the experiment, a YAML file")
    check.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a setting, as in corpora.limits.train=500",
    )
    check.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="for data-check.html and data-check.json (default: the experiment's output)",
    )
    # Where it is not given here, it may be before the word check.
    check.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print the result as JSON")


def _check(options: argparse.Namespace) -> int:
    from flows.progress import RunProgress
    from lors.config import load_experiment
    from lors.files import storage_errors, write_json
    from lors.outputs import require_writable
    from lors.s3_store import open_store
    from lors.speech.data_check import check
    from lors.speech.data_check_page import page

    experiment = load_experiment(options.file, options.set)
    out = options.out or experiment.output
    for folder in (out, open_store(experiment.store).root):
        require_writable(folder)
    report = check(experiment, RunProgress)
    with storage_errors(out):
        write_json(out / "data-check.json", report.to_json())
        (out / "data-check.html").write_text(page(report, f"Data of {options.file.name}"), encoding="utf-8")
    if options.json:
        print(json.dumps(report.to_json(), indent=2, ensure_ascii=False))
    else:
        print(_text(report))
        print(f"\nThe page is {out / 'data-check.html'}, the figures are in data-check.json beside it.")
    return 1 if report.failed else 0


def _text(report: DataReport) -> str:
    head = ("", "utterances", "hours", "median s", "longest s", "speakers", "translated", "misfits", "rejected")
    rows = [
        (
            f"{facts.language} {facts.split}",
            str(facts.utterances),
            f"{facts.hours:.2f}",
            f"{facts.seconds.median:.1f}",
            f"{facts.seconds.maximum:.1f}",
            str(facts.speakers or "-"),
            str(facts.utterances - facts.without_translation),
            str(facts.misfits.count),
            str(sum(facts.rejected.values())),
        )
        for facts in report.splits
    ]
    lines = _columns([head, *rows]) if rows else ["No split could be prepared."]
    width = max(80, min(140, shutil.get_terminal_size().columns)) if sys.stdout.isatty() else 10**6
    for finding in report.findings:
        label = f"{finding.severity:<7}  {finding.where}: "
        lines += textwrap.wrap(label + finding.sentence, width, subsequent_indent=" " * 9, break_long_words=False)
    if not report.findings:
        lines.append("Nothing is wrong.")
    return "\n".join(lines)


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    shown = [[cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)] for row in rows]
    lines = [f"{row[0]:<{widths[0]}}  {'  '.join(cells)}" for row, cells in zip(rows, shown, strict=True)]
    return [*lines, ""]
