"""Several variants of an experiment as one graph: a grid of settings, several seeds. No torch and no Prefect here.

What variants have in common is one step, so a grid over `prune` trains nothing twice.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from lors.config import Experiment, load_experiment
from lors.errors import ConfigError
from lors.pipeline import Sources, build_steps
from lors.settings import Section
from lors.steps import VERSIONS, Step
from lors.store import Store, step_key
from lors.yaml_text import read_yaml

__all__ = ["Variant", "build_variants", "join", "parse_grid", "seed_variants", "sweep_table", "variants"]


class Variant(Section):
    """One point of a grid, with one seed."""

    name: str
    """Such as `rank_ratio=0.05 density=0.1`; empty where there is one variant alone."""
    changes: dict[str, Any] = {}
    """The settings that differ, by dotted key."""
    seed: int | None = None
    """Of `seeds`; None: `finetune.seed`."""
    experiment: Experiment
    """With its own output folder."""

    @property
    def folder(self) -> str:
        """Its results, under the output of the whole."""
        return _folder(self.name)

    @property
    def columns(self) -> dict[str, Any]:
        """What tells its rows from the others': the changed settings and the seed."""
        return {**self.changes, **({} if self.seed is None else {"seed": self.seed})}


def _folder(name: str) -> str:
    return re.sub(r"[^\w.=-]+", "_", name)


def parse_grid(given: Iterable[str]) -> dict[str, list[Any]]:
    """`key=value,value` options as the values of each key; raises ConfigError."""
    grid: dict[str, list[Any]] = {}
    for text in given:
        key, equals, listed = text.partition("=")
        if not equals or not key.strip() or not listed.strip():
            raise ConfigError(f"--grid {text!r} is not key=value,value, such as prune.rank_ratio=0.05,0.1")
        try:
            values = read_yaml(f"[{listed}]")
            shown = [json.dumps(value) for value in values]
        except yaml.YAMLError as error:
            raise ConfigError(f"--grid {text!r}: the values are not valid YAML") from error
        except TypeError as error:
            raise ConfigError(
                f"--grid {text!r}: YAML reads a value as a date or the like, which no setting is: correct it, or put "
                "it in quotes"
            ) from error
        if twice := [value for value in shown if shown.count(value) > 1]:
            raise ConfigError(f"--grid {key.strip()} has {twice[0]} twice: give each value once")
        if key.strip() in grid:
            raise ConfigError(f"--grid {key.strip()} is given twice: list all its values in one")
        if key.strip() in ("output", "store", "seeds"):
            raise ConfigError(f"--grid {key.strip()} is of the whole sweep: change it with --set")
        grid[key.strip()] = values
    return grid


def variants(file: Path, changes: Sequence[str], grid: Mapping[str, Sequence[Any]]) -> list[Variant]:
    """Every combination of the grid's values, in its order, each once for every seed; raises ConfigError."""
    short = {key: key.rpartition(".")[2] for key in grid}
    names = {key: last if [*short.values()].count(last) == 1 else key for key, last in short.items()}
    points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    named = [" ".join(f"{names[key]}={_shown(value)}" for key, value in point.items()) for point in points]
    folders = [_folder(name) for name in named]
    found: list[Variant] = []
    for point, name, folder in zip(points, named, folders, strict=True):
        experiment = load_experiment(file, [*changes, *(f"{key}={json.dumps(value)}" for key, value in point.items())])
        if experiment.seeds is not None and "finetune.seed" in grid:
            raise ConfigError("--grid finetune.seed and `seeds` both say the seed: leave one of them out")
        if folders.count(folder) > 1:  # such as that of [] and ["*"]
            name += f" {hashlib.sha256(json.dumps(point).encode()).hexdigest()[:8]}"
        found += seed_variants(experiment, name, point)
    return found


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def seed_variants(experiment: Experiment, name: str = "", changes: Mapping[str, Any] | None = None) -> list[Variant]:
    """One variant for each of the experiment's seeds; where it has none, and no name, the experiment itself."""
    made = []
    for seed in experiment.seeds or (None,):
        own = " ".join(filter(None, (name, "" if seed is None else f"seed={seed}")))
        variant = Variant(name=own, changes=dict(changes or {}), seed=seed, experiment=experiment)
        update: dict[str, Any] = {"output": experiment.output / variant.folder, "seeds": None}
        if seed is not None:
            update["finetune"] = experiment.finetune.model_copy(update={"seed": seed})
        made.append(variant.model_copy(update={"experiment": experiment.model_copy(update=update)}))
    return made


def join(graphs: Sequence[tuple[str, Mapping[str, Step]]]) -> tuple[dict[str, Step], list[dict[str, str]]]:
    """The steps of several graphs (by their name) as one, and for each graph what its steps are called there.

    Steps with the same stage, settings and inputs are one; others get the name of their graph behind theirs.
    """
    joined: dict[str, Step] = {}
    known: dict[str, str] = {}
    called = []
    for graph, steps in graphs:
        names: dict[str, str] = {}
        for name, step in steps.items():
            inputs = {role: replace(source, step=names[source.step]) for role, source in step.inputs.items()}
            read = {role: f"{source.step}: {', '.join(source.files)}" for role, source in inputs.items()}
            identity = step_key(step.stage, VERSIONS[step.stage], step.settings, {**step.outside, **read})
            if identity not in known:
                known[identity] = name if name not in joined else f"{name} [{graph}]"
                joined[known[identity]] = replace(step, name=known[identity], inputs=inputs)
            names[name] = known[identity]
        called.append(names)
    return joined, called


def build_variants(
    variants: Sequence[Variant], store: Store, sources: Sources | None = None
) -> tuple[dict[str, Step], list[dict[str, str]]]:
    """The steps of all variants as one graph, and what each variant's are called in it; arguments and errors as of
    `build_steps`.
    """
    return join([(variant.name, build_steps(variant.experiment, store, sources)) for variant in variants])


_MEANS = ("recovery", "wer", "cer", "bleu", "chrf")


def sweep_table(found: Sequence[tuple[Variant, Mapping[str, Any]]]) -> tuple[list[dict[str, Any]], str]:
    """One row a point of the grid and merged system, from the summaries of the variants; and as Markdown.

    Over several seeds a row has their mean and, as `NAME_sd`, their sample standard deviation. `validation` is the
    value that the search chose by, or the touched-up model's, so that a point can be picked without the test split.
    """
    points: dict[str, list[tuple[Variant, Mapping[str, Any]]]] = {}
    for variant, summary in found:
        points.setdefault(json.dumps(variant.changes, sort_keys=True), []).append((variant, summary))
    rows = []
    for group in points.values():
        first, summary = group[0]
        for system in summary["systems"]:
            row: dict[str, Any] = {**first.changes, "system": system, "seeds": len(group)}
            row |= _mean("validation", [summary["validation"].get(system) for _, summary in group])
            for name in _MEANS:
                row |= _mean(name, [summary["systems"][system].get(name) for _, summary in group])
            rows.append(row)
    return rows, _markdown(rows)


def _mean(name: str, values: Sequence[float | None]) -> dict[str, float | None]:
    present = [value for value in values if value is not None]
    if len(present) < len(values):
        return {name: None}
    spread = {f"{name}_sd": statistics.stdev(present)} if len(present) > 1 else {}
    return {name: statistics.fmean(present), **spread}


def _markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    heads = [name for name in rows[0] if not name.endswith("_sd") and any(row.get(name) is not None for row in rows)]
    lines = [heads, ["---"] * len(heads)]
    for row in rows:
        cells = []
        for name in heads:
            value, spread = row.get(name), row.get(f"{name}_sd")
            digits = 2 if name == "recovery" else 1
            if name in ("validation", *_MEANS) and value is not None:
                cell = f"{value:.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")
            else:
                cell = "-" if value is None else _shown(value)
            cells.append(cell)
        lines.append(cells)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
