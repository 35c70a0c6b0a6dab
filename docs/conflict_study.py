"""Which part of the model experts conflict in: what each expert does to all languages and tasks, and which parts merge.

    python docs/conflict_study.py deployments/published.yaml conflict.json --scaling 0.17 0.33 --utterances 40

Takes the experts and the validation splits of an experiment that ran (`lors run FILE`) from its store, and prints the
share of the experts' gain that a model has on each language and task, with L the teacher-forced cross-entropy a token:

    (L(base) - L(model)) / (L(base) - L(expert))

1 is the expert, 0 the base, below 0 worse than the base. `mean` is the base plus the mean of all task vectors, and
`sum x c` plus c times their sum; in `own decoder, mean encoder` each language and task has its own expert's decoder.
The losses are kept in the results file as they are measured: a killed run goes on from there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

import torch
from diagnose_study import Measured, artifacts

from lors.checkpoint import Checkpoint
from lors.config import load_experiment
from lors.pipeline import resolve_base
from lors.scaling import part_of
from lors.speech.architecture import architecture_of
from lors.speech.corpus import read_split
from lors.speech.load import load_model
from lors.store import step_key
from lors.task_vector import TaskVector, apply
from lors.training.finetune import examples_for, validation_loss

Weights = Mapping[str, float]
"""The coefficient of each expert's task vector."""
Parts = Mapping[str, Weights]
"""Those in the encoder and in the decoder."""


def main() -> None:
    """Measure, and print the table and the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="the experiment's YAML file")
    parser.add_argument("results", type=Path, help="JSON file that keeps the measured losses")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as in `lors run`")
    parser.add_argument("--scaling", type=float, nargs="+", default=[0.5, 1.0], help="of the sums")
    parser.add_argument("--utterances", type=int, default=10**6, help="the most of a validation split that are used")
    given = parser.parse_args()
    torch.set_flush_denormal(True)
    experiment = load_experiment(given.file, given.set)
    found = artifacts(experiment)
    base = Checkpoint(resolve_base(experiment.base))
    model, processor = load_model(base.folder, device="cuda" if torch.cuda.is_available() else "cpu")
    together = len(experiment.merged) < len(experiment.experts)
    owner = {e.id: f"{e.language}-{experiment.tasks[0]}" if together else e.id for e in experiment.experts}
    vectors = {e.id: TaskVector(base, Checkpoint(found[f"fine-tune {e.id}"][0])) for e in experiment.merged}
    examples = {
        e.id: examples_for(
            read_split(found[f"prepare {e.language} validation"][0] / "validation.parquet")[: given.utterances],
            processor.tokenizer, e.language, e.task, model.config.max_target_positions, architecture_of(model),
        )
        for e in experiment.experts
    }  # fmt: skip
    digests = {name: digest for name, (_, digest) in found.items()}
    measured = Measured(given.results, step_key("conflict_study", 1, {"utterances": given.utterances}, digests))

    def loss(name: str, weights: Parts, on: str) -> float:
        def measure() -> float:
            state = {}
            for tensor in base.float_names:
                own = weights[part_of(tensor)].items()
                total = sum((weight * vectors[e].delta(tensor) for e, weight in own), torch.zeros(base.shape(tensor)))
                state[tensor] = apply(base.tensor(tensor), total, 1.0)
            model.load_state_dict(state, strict=False)
            decoding = experiment.evaluate
            return validation_loss(model, examples[on], batch_seconds=decoding.batch_seconds, window=decoding.window)

        return measured.get(f"{name} on {on}", measure)

    def row(name: str, encoder: Weights | None, decoder: Weights | None) -> dict[str, float]:
        """The loss on each language and task; None: as its own expert."""
        found = {}
        for on, expert in owner.items():
            own = {expert: 1.0}
            parts = {"encoder": own if encoder is None else encoder, "decoder": own if decoder is None else decoder}
            found[on] = loss(name, parts, on)
        return found

    mean, nothing = dict.fromkeys(vectors, 1 / len(vectors)), dict[str, float]()
    rows = {"base": row("base", nothing, nothing), "own expert": row("own expert", None, None)}
    for one in vectors:
        alone = {one: 1.0}
        rows[f"expert {one}"] = row(f"expert {one}", alone, alone)
        rows[f"its encoder ({one})"] = row(f"encoder of {one}", alone, nothing)
        rows[f"its decoder ({one})"] = row(f"decoder of {one}", nothing, alone)
    rows["own decoder, mean encoder"] = row("own decoder, mean encoder", mean, None)
    rows["own encoder, mean decoder"] = row("own encoder, mean decoder", None, mean)
    rows["mean"] = row("mean", mean, mean)
    for scaling in given.scaling:
        every = dict.fromkeys(vectors, scaling)
        rows[f"sum x {scaling:g}"] = row(f"sum x {scaling:g}", every, every)
    base_row, expert_row = rows.pop("base"), rows["own expert"]
    shares = {
        name: {on: (base_row[on] - own[on]) / (base_row[on] - expert_row[on]) for on in own}
        for name, own in rows.items()
    }
    print("\n| | " + " | ".join(owner) + " | mean |\n| --- " + "| ---: " * (len(owner) + 1) + "|")
    for name, own in shares.items():
        print(f"| {name} | " + " | ".join(f"{share:.2f}" for share in (*own.values(), fmean(own.values()))) + " |")
    print(json.dumps({name: {on: round(share, 4) for on, share in own.items()} for name, own in shares.items()}))


if __name__ == "__main__":
    main()
