"""The commands `lors evaluate` and `lors report`. No Prefect here."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["add_commands"]


def add_commands(add: Callable[..., Any]) -> None:
    """Add the commands to the parser of `flows.cli`."""
    evaluate = add(
        "evaluate",
        _evaluate,
        "Decode speech with one or several models, and score them side by side; what was decoded is kept.",
        "lors evaluate starter --corpus synthetic --language es --limit 20",
        "lors evaluate base=openai/whisper-small merged=outputs/demo/model --corpus fleurs --language es --language fr",
        "lors evaluate outputs/demo/model --corpus deployments/demo.yaml --task translate --set evaluate.beams=5",
        "lors evaluate my-model --corpus calls.jsonl --language de --set evaluate.normaliser=whisper_basic",
    )
    evaluate.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="a folder or hub id, or NAME=MODEL; p-values are relative to the one called base",
    )
    evaluate.add_argument(
        "--corpus",
        required=True,
        help="synthetic; fleurs, covost2, mls or voxpopuli; a hub id; a table (csv, tsv, jsonl, parquet), a folder, or "
        "a path with {language} and {split} in it; or an experiment's YAML file",
    )
    evaluate.add_argument(
        "--language", action="append", default=[], metavar="CODE", help="spoken in it; several times for several"
    )
    evaluate.add_argument(
        "--task",
        action="append",
        default=[],
        choices=("transcribe", "translate"),
        help="both, if given twice (default: transcribe, or the experiment's)",
    )
    evaluate.add_argument(
        "--split", default="test", choices=("train", "validation", "test"), help="of the corpus (default: test)"
    )
    evaluate.add_argument("--limit", type=int, metavar="N", help="the most utterances of each language, the first ones")
    evaluate.add_argument("--out", type=Path, metavar="FOLDER", help="for the results (default: outputs/evaluation)")
    evaluate.add_argument("--store", type=Path, metavar="FOLDER", help="for all that is computed (default: store)")
    evaluate.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting, as in evaluate.beams=5"
    )
    report = add(
        "report",
        _report,
        "Write report.html of finished runs anew; with --out, of several runs side by side.",
        "lors report outputs/demo",
        "lors report outputs/demo outputs/other --out comparison.html",
    )
    report.add_argument("outputs", nargs="+", type=Path, metavar="OUTPUT", help="the output folder of a run or a sweep")
    report.add_argument("--out", type=Path, metavar="FILE", help="one page for all (default: report.html in each)")


def _evaluate(options: argparse.Namespace) -> int:
    from flows.progress import RunProgress
    from lors.evaluation import evaluate, name_models, request
    from lors.report import write_report

    models = name_models(options.models)
    experiment = request(
        models,
        options.corpus,
        languages=options.language,
        tasks=options.task,
        split=options.split,
        limit=options.limit,
        changes=options.set,
        output=options.out,
        store=options.store,
    )
    summary = evaluate(experiment, models, split=options.split, progress=RunProgress)
    output = experiment.output
    write_report([output], output / "report.html")
    if options.json:
        print(json.dumps(summary, indent=2, ensure_ascii=False))
    else:
        print((output / "table.md").read_text("utf-8").strip())
        print(f"\nAll results are in {output}, for people in report.html.")
    return 0


def _report(options: argparse.Namespace) -> int:
    from lors.report import write_report

    pages = [options.out] if options.out else [folder / "report.html" for folder in options.outputs]
    if options.out:
        write_report(options.outputs, options.out)
    else:
        for folder, page in zip(options.outputs, pages, strict=True):
            write_report([folder], page)
    if options.json:
        print(json.dumps({"pages": [str(page) for page in pages]}, indent=2))
    else:
        print("\n".join(f"Written: {page}" for page in pages))
    return 0
