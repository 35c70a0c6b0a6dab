"""What a compact expert is worth at each size: file size, retained energy, and the error of base + that one expert.

    python docs/compact_study.py deployments/whisper-base-es-fr.yaml study.json --sizes 5MB 10MB 20MB 40MB 145MB

Takes the experts and the test splits of an experiment that ran (`lors run FILE`) from its store, prunes each expert to
each size by `lors prune --budget`, applies it to the base, and decodes the test split. Every figure is kept in the
results file as it is measured: a killed run goes on from there. Prints a table; the intervals are 95 % bootstrap ones.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diagnose_study import artifacts

from lors.checkpoint import Checkpoint
from lors.compact import prune_expert
from lors.config import Experiment, Expert, load_experiment
from lors.delta_file import DeltaFile
from lors.files import write_json
from lors.pipeline import resolve_base
from lors.scoring.metrics import main_metric, score
from lors.speech.corpus import read_split
from lors.speech.load import load_model
from lors.speech.transcribe import transcribe
from lors.task_vector import TaskVector, apply


def error_of(experiment: Experiment, expert: Expert, source: TaskVector | DeltaFile | None, corpus: Path) -> Any:
    """The score of base + one delta on the expert's own language and task."""
    base = Checkpoint(resolve_base(experiment.base))
    model, processor = load_model(base.folder, device="cuda" if torch.cuda.is_available() else "cpu")
    if source is not None:
        state = {name: apply(base.tensor(name), source.delta(name), 1.0).float() for name in base.float_names}
        model.load_state_dict(state, strict=False)
    own = experiment.evaluate
    utterances = [u for u in read_split(corpus / "test.parquet") if u.target(expert.task) is not None]
    hypotheses = transcribe(
        model, processor, utterances, language=expert.language, tasks=(expert.task,), window=own.window,
        beams=own.beams, batch_seconds=own.batch_seconds,
    )  # fmt: skip
    texts = {hypothesis.id: hypothesis.text for hypothesis in hypotheses}
    references, written = zip(*((u.target(expert.task), texts[u.id]) for u in utterances), strict=True)
    metric = main_metric(expert.task, expert.language)
    return score(metric, references, written, language=expert.language, normaliser=own.normaliser)


def rows(experiment: Experiment, results: Path, sizes: list[str]) -> Iterator[dict[str, Any]]:
    """One row an (expert, size), measured or read back."""
    found, known = artifacts(experiment), {}
    if results.exists():
        known = json.loads(results.read_text("utf-8"))
    base = Checkpoint(resolve_base(experiment.base))
    for expert in experiment.experts:
        (folder, digest), corpus = found[f"fine-tune {expert.id}"], found[f"prepare {expert.language} test"][0]
        for size in ("base", *sizes, "whole"):
            key = f"{expert.id} {digest[:12]} {size}"
            if key not in known:
                row: dict[str, Any] = {"expert": expert.id, "size": size, "bytes": 0, "retained": 0.0}
                with tempfile.TemporaryDirectory() as scratch:
                    source: TaskVector | DeltaFile | None = None
                    if size == "whole":
                        source = TaskVector(base, Checkpoint(folder))
                        row |= {"bytes": 4 * base.parameters, "retained": 1.0}
                    elif size != "base":
                        out = Path(scratch) / "expert.safetensors"
                        source = prune_expert(base.folder, folder, out, budget=size)
                        row |= {"bytes": out.stat().st_size, "retained": source.retained_energy, "dtype": source.dtype}
                    measured = error_of(experiment, expert, source, corpus)
                known[key] = row | {"metric": measured.metric, "value": measured.value,
                                    "low": measured.low, "high": measured.high}  # fmt: skip
                write_json(results, known)
                print(f"{key}: {known[key]['metric']} {known[key]['value']:.1f}", flush=True)
            yield known[key]


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--sizes", nargs="+", default=["5MB", "10MB", "20MB", "40MB", "145MB"])
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    experiment = load_experiment(options.experiment, options.set)
    measured = list(rows(experiment, options.results, options.sizes))
    print("| size | " + " | ".join(f"{e.id} | retained" for e in experiment.experts) + " |")
    print("| --- " + "| --- | ---: " * len(experiment.experts) + "|")
    for size in ("base", *options.sizes, "whole"):
        cells = [
            f"{row['metric']} {row['value']:.1f} ({row['low']:.1f} to {row['high']:.1f}) | {row['retained']:.1%}"
            for expert in experiment.experts
            for row in measured
            if (row["expert"], row["size"]) == (expert.id, size)
        ]
        print(f"| {size} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
