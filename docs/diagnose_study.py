"""How well the figures of `lors diagnose` rank pairs of experts by the damage that merging them does.

    python docs/diagnose_study.py deployments/published.yaml study.json --scaling 0.3 0.5 1

Takes the experts and the test splits of an experiment that ran (`lors run FILE`) from its store, merges every pair by
task arithmetic at each scaling coefficient, measures, and prints for each figure Spearman's rank correlation with the
damage. The losses are kept in the results file as they are measured: a killed run goes on from there.

For the experts i and j of a pair, with L the cross-entropy a token (teacher forced) on the test split of the first:

    damage(i | j) = (L_i(base + lambda * (tau_i + tau_j)) - L_i(expert i)) / (L_i(base) - L_i(expert i))
    damage(pair)  = damage(i | j) + damage(j | i)

0 means that both are as good as alone, 2 that both fell back to the base. p is Mantel's (1967): pairs share experts, so
the experts are relabelled, in every order where there are at most 7 and in 10 000 random ones otherwise; two-sided. It
is for one figure: of twenty looked at, one has p < 0.05 by chance. `interference` and `predicted_loss` were chosen on
the demo's six experts, out of about thirty candidates, so their correlation there is flattered.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import rankdata

from lors.checkpoint import Checkpoint
from lors.config import Experiment, Expert, load_experiment
from lors.diagnosis import Diagnosis
from lors.diagnostics import diagnose
from lors.errors import InputError
from lors.files import write_json
from lors.pipeline import build_steps, resolve_base
from lors.s3_store import open_store
from lors.speech.architecture import architecture_of
from lors.speech.corpus import read_split
from lors.speech.load import load_model
from lors.store import step_key
from lors.task_vector import TaskVector, apply
from lors.training.finetune import examples_for, validation_loss

Figures = Mapping[str, np.ndarray]  # name -> (pairs,)
EXACT, RELABELLINGS = 7, 10_000


def artifacts(experiment: Experiment) -> dict[str, tuple[Path, str]]:
    """(folder, digest) of each prepared split and expert of an experiment, by the name of its step."""
    store = open_store(experiment.store)
    found: dict[str, Any] = {}
    for step in build_steps(experiment, store).values():
        if step.stage in ("prepare_split", "fine_tune"):
            inputs = {name: found[source.step] for name, source in step.inputs.items()}
            found[step.name] = store.find(step.stage, step.key(inputs))
            if found[step.name] is None:
                raise InputError(f"the store {store.root} lacks the step {step.name!r}; run the experiment first")
    return {name: (store.path(artifact), artifact.digest) for name, artifact in found.items()}


class Measured:
    """The losses by what was measured, in a JSON file that each new one is added to."""

    def __init__(self, path: Path, about: str) -> None:
        self.path, self.about = path, about
        known: dict[str, Any] = {"about": about, "losses": {}}
        if path.exists():
            known = json.loads(path.read_text("utf-8"))
        if known["about"] != about:
            raise InputError(f"{path} is of other experts, test data or limits; give another results file")
        self.losses: dict[str, float] = known["losses"]

    def get(self, key: str, measure: Callable[[], float]) -> float:
        if key not in self.losses:
            self.losses[key] = measure()
            print(f"{key}: {self.losses[key]:.4f}", flush=True)
            write_json(self.path, {"about": self.about, "losses": self.losses})
        return self.losses[key]


def damages(
    experiment: Experiment, vectors: Mapping[str, TaskVector], results: Path, scalings: Sequence[float], limit: int
) -> dict[float, np.ndarray]:  # scaling -> (pairs,), in the order of itertools.combinations
    """Measure, or read back, the damage of every pair."""
    found = artifacts(experiment)
    digests = {name: digest for name, (_, digest) in found.items()}
    measured = Measured(results, step_key("diagnose_study", 1, {"utterances": limit}, digests))
    base = next(iter(vectors.values())).base
    model, processor = load_model(base.folder, device="cuda" if torch.cuda.is_available() else "cpu")
    examples = {
        e.id: examples_for(
            read_split(found[f"prepare {e.language} test"][0] / "test.parquet")[:limit],
            processor.tokenizer, e.language, e.task, model.config.max_target_positions, architecture_of(model),
        )
        for e in experiment.experts
    }  # fmt: skip

    def loss(merged: Sequence[str], scaling: float, expert: str) -> float:
        def measure() -> float:
            state = {}
            for name in base.float_names:
                total = sum((vectors[one].delta(name) for one in merged), torch.zeros(base.shape(name)))
                state[name] = apply(base.tensor(name), total, scaling)
            model.load_state_dict(state, strict=False)
            own = experiment.evaluate
            return validation_loss(model, examples[expert], batch_seconds=own.batch_seconds, window=own.window)

        return measured.get(f"{' + '.join(merged) or 'base'} at {scaling:g} on {expert}", measure)

    base_loss = {expert: loss((), 0.0, expert) for expert in vectors}
    alone = {expert: loss((expert,), 1.0, expert) for expert in vectors}
    if worse := [expert for expert in vectors if base_loss[expert] <= alone[expert]]:
        raise InputError(f"the expert {worse[0]} is no better than the base, so its damage has no unit; leave it out")

    def damage(pair: tuple[str, str], scaling: float) -> float:
        lost = ((loss(pair, scaling, one) - alone[one]) / (base_loss[one] - alone[one]) for one in pair)
        return sum(lost)

    pairs = list(itertools.combinations(vectors, 2))
    return {scaling: np.array([damage(pair, scaling) for pair in pairs]) for scaling in scalings}


def mantel(x: np.ndarray, y: np.ndarray, experts: int) -> tuple[float, float]:
    """Spearman's rho of two figures of pairs, and Mantel's two-sided p under relabelled experts."""
    index = np.zeros((experts, experts), dtype=int)
    rows, columns = np.triu_indices(experts, 1)
    index[rows, columns] = index[columns, rows] = np.arange(len(rows))
    generator = np.random.default_rng(0)
    orders = (
        list(itertools.permutations(range(experts)))
        if experts <= EXACT
        else [list(range(experts)), *(generator.permutation(experts).tolist() for _ in range(RELABELLINGS))]
    )
    ranks = [rankdata(figure) - (len(rows) + 1) / 2 for figure in (x, y)]
    scale = math.sqrt(np.square(ranks[0]).sum() * np.square(ranks[1]).sum())
    if scale == 0:
        return math.nan, math.nan
    null = np.array([ranks[0][index[np.array(o)[rows], np.array(o)[columns]]] @ ranks[1] for o in orders]) / scale
    return float(null[0]), float((np.abs(null) >= abs(null[0]) - 1e-9).mean())


def figures(diagnosis: Diagnosis, experts: Sequence[Expert]) -> Figures:
    """Each figure of a pair over the whole model, in the order of itertools.combinations of the sorted experts.

    Beside them what needs no figure: whether a pair shares its language, or its task.
    """
    wide = diagnosis.pairs[diagnosis.pairs.level == "model"].set_index(["first", "second"])
    found = {name: wide[name].to_numpy(float) for name in diagnosis.PAIR_FIGURES}
    spaces = diagnosis.subspaces[diagnosis.subspaces.level == "model"]
    for ratio, rows in spaces.groupby("rank_ratio"):
        for name in ("left_overlap", "right_overlap", "interference"):
            found[f"{name} at {ratio:.0%}"] = rows.set_index(["first", "second"])[name].loc[wide.index].to_numpy(float)
    known = {expert.id: expert for expert in experts}
    for name in ("language", "task"):
        same = [getattr(known[first], name) == getattr(known[second], name) for first, second in wide.index]
        found[f"same {name}"] = np.array(same, dtype=float)
    return found


def main() -> None:
    """Measure, diagnose, and print the table and the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="the experiment's YAML file")
    parser.add_argument("results", type=Path, help="JSON file that keeps the measured losses")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as in `lors run`")
    parser.add_argument("--scaling", type=float, nargs="+", default=[0.5, 1.0], help="scaling coefficients")
    parser.add_argument("--utterances", type=int, default=10**6, help="the most of a test split that are used")
    given = parser.parse_args()
    torch.set_flush_denormal(True)
    experiment = load_experiment(given.file, given.set)
    found = artifacts(experiment)
    base = Checkpoint(resolve_base(experiment.base))
    vectors = {
        e: TaskVector(base, Checkpoint(found[f"fine-tune {e}"][0])) for e in sorted(x.id for x in experiment.experts)
    }
    damage = damages(experiment, vectors, given.results, given.scaling, given.utterances)
    rows: dict[str, dict[str, tuple[float, float]]] = {}
    for scaling, lost in damage.items():
        for name, figure in figures(diagnose(base, vectors, scaling=scaling), experiment.experts).items():
            rows.setdefault(name, {})[f"{scaling:g}"] = mantel(figure, lost, len(vectors))
    pairs = [" + ".join(pair) for pair in itertools.combinations(vectors, 2)]
    print("\n" + pd.DataFrame({f"damage at {s:g}": d for s, d in damage.items()}, index=pairs).round(3).to_string())
    head = [f"{scaling:g}: rho (p)" for scaling in damage]
    print("\n| figure | " + " | ".join(head) + " |\n" + "| --- " * (len(head) + 1) + "|")
    for name, cells in rows.items():
        print(f"| {name} | " + " | ".join(f"{rho:.2f} ({p:.3f})" for rho, p in cells.values()) + " |")
    record = {name: {s: [round(v, 4) for v in cell] for s, cell in cells.items()} for name, cells in rows.items()}
    print(json.dumps({"pairs": len(pairs), "damage": {f"{s:g}": d.round(4).tolist() for s, d in damage.items()},
                      "spearman_and_p": record}))  # fmt: skip


if __name__ == "__main__":
    main()
