"""The output folder of a run, read for its report. Folders of older versions lack some of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from lors.errors import InputError
from lors.files import is_safe
from lors.model_folder import read_json
from lors.scoring.files import load_results
from lors.scoring.metrics import main_metric

__all__ = ["Run", "flat_settings", "load_run", "load_runs"]

_SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, eq=False)
class Run:
    """One run; what it does not have is empty."""

    name: str
    folder: Path
    results: pd.DataFrame
    summary: Mapping[str, Any]
    training: pd.DataFrame | None
    diagnosis: Mapping[str, Any] | None
    changes: Mapping[str, Any] | None = None
    """What tells it from the other runs of its sweep."""

    @property
    def systems(self) -> dict[str, dict[str, Any]]:
        """The means of every system, in the order of the tables."""
        return dict(self.summary["systems"])

    @property
    def guard(self) -> tuple[str, ...]:
        """Languages that no expert was trained for."""
        return tuple(self.summary.get("guard", {}).get("languages", ()))

    @cached_property
    def split(self) -> str:
        """The one that is summarised."""
        return str(self.summary.get("split") or max(self.results["split"], key=_SPLITS.index))

    @cached_property
    def scores(self) -> pd.DataFrame:
        """The rows of that split, each metric once: by the run's normaliser."""
        rows = self.results[self.results["split"] == self.split]
        if "normaliser" in rows:
            normaliser = self.summary.get("normaliser", "lors")
            rows = rows[rows["normaliser"].eq(normaliser) | rows["task"].eq("translate")]
        return rows.reset_index(drop=True)

    @cached_property
    def main(self) -> pd.DataFrame:
        """The rows of `scores` by the metric that decides."""
        metrics = [main_metric(*pair) for pair in zip(self.scores["task"], self.scores["language"], strict=True)]
        return self.scores[self.scores["metric"] == metrics]

    def pairs(self, *, guard: bool = False) -> list[tuple[str, str]]:
        """Languages and tasks, task by task."""
        rows = self.main[self.main["language"].isin(self.guard) == guard]
        pairs = dict.fromkeys(zip(rows["language"], rows["task"], strict=True))
        return sorted(pairs, key=lambda pair: pair[1] != "transcribe")

    def hypotheses(self) -> dict[str, pd.DataFrame]:
        """What each system wrote; systems whose table is not there are left out."""
        names = [name for name in self.systems if "/" not in name and is_safe(f"{name}.parquet")]
        files = {name: self.folder / "hypotheses" / f"{name}.parquet" for name in names}
        return {name: _table(file) for name, file in files.items() if file.is_file()}


def load_run(folder: Path) -> Run:
    """One output folder; raises InputError where it has no results or what it has cannot be read."""
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}: name the `output` of a run")
    results = load_results(folder)
    summary = read_json(_needed(folder / "summary.json"))
    if not isinstance(summary.get("systems"), dict):
        raise InputError(f"{folder / 'summary.json'} names no systems, so it is no summary of a run: run it again")
    training, diagnosis = folder / "training.csv", folder / "diagnosis.json"
    return Run(
        name=folder.resolve().name,
        folder=folder,
        results=results,
        summary=summary,
        training=_table(training) if training.is_file() else None,
        diagnosis=read_json(diagnosis) if diagnosis.is_file() else None,
    )


def load_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs of all folders, those of a sweep in its place; raises InputError like `load_run`."""
    runs = []
    for folder in folders:
        listing = folder / "sweep.json"
        if not listing.is_file():
            runs.append(load_run(folder))
            continue
        for variant in read_json(listing)["variants"]:
            seed = {} if variant.get("seed") is None else {"seed": variant["seed"]}
            name, changes = variant["name"], {**variant["changes"], **seed}
            if "/" in (place := str(variant["folder"])) or not is_safe(place):
                raise InputError(f"{listing} names the folder {place!r}, which is not in {folder}: run the sweep again")
            runs.append(replace(load_run(folder / place), name=name, changes=changes))
    names = [run.name for run in runs]
    return [run if names.count(run.name) == 1 else replace(run, name=str(run.folder)) for run in runs]


def _needed(file: Path) -> Path:
    if not file.is_file():
        raise InputError(f"{file.parent} has no {file.name}: run it again, or name the `output` of a run")
    return file


def _table(file: Path) -> pd.DataFrame:
    try:
        return pd.read_parquet(file) if file.suffix == ".parquet" else pd.read_csv(file)
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read as a table ({error}): run again to write it anew") from error


def flat_settings(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Each setting by its dotted key, as JSON."""
    found: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            found |= flat_settings(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return found
