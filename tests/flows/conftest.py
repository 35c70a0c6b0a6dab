"""One tiny experiment, run once for all: what the tests change is computed on top of its store."""

from __future__ import annotations

import json
from typing import Any

import pytest
from flows_helpers import Done, planned, tiny

from lors.config import Experiment, parse_experiment


@pytest.fixture(scope="session")
def done(prefect_api: str, tmp_path_factory: pytest.TempPathFactory) -> Done:
    from flows.pipeline import full_pipeline

    folder = tmp_path_factory.mktemp("tiny")

    def make(**changes: Any) -> Experiment:
        return parse_experiment(tiny(folder, **changes))

    before = planned(make())
    result = full_pipeline(make())
    summary = json.loads((folder / "out" / "summary.json").read_text())
    return Done(prefect_api, folder, make, before, result, summary)
