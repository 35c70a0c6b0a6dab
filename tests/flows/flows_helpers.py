"""A tiny experiment for the flows' tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lors.config import Experiment
from lors.pipeline import build_steps
from lors.steps import plan
from lors.store import Store


def tiny(folder: Path, **changes: Any) -> dict[str, Any]:
    """Two languages x two tasks on the starter, hardly trained; settings as in a YAML file."""
    settings: dict[str, Any] = {
        "base": "starter",
        "languages": ["es", "fr"],
        "corpora": {"source": "synthetic", "utterances": {"train": 6, "validation": 2, "test": 3}},
        "finetune": {"steps": 2, "learning_rate": 1e-3, "batch_seconds": 10},
        "merge": {"scaling": {"search": [0.3, 0.6], "metric": "loss"}},
        "evaluate": {"batch_seconds": 20},
        "resources": {"parallel": 1, "threads": 1},  # each child more takes seconds to start
        "output": str(folder / "out"),
        "store": str(folder / "store"),
    }
    return settings | changes


def written(path: Path, settings: dict[str, Any]) -> Path:
    """The settings as a YAML file."""
    path.write_text(yaml.safe_dump(settings))
    return path


def planned(experiment: Experiment) -> set[str]:
    """The steps that a run would compute."""
    store = Store(experiment.store)
    return {p.step.name for p in plan(build_steps(experiment, store), store) if not p.cached}


@dataclass(frozen=True)
class Done:
    """The experiment after its first run."""

    api: str
    folder: Path
    make: Callable[..., Experiment]
    planned: set[str]
    """What the plan said before."""
    result: dict[str, Any]
    summary: dict[str, Any]
