"""One tiny experiment, run once for all: what the tests change is computed on top of its store."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from flows_helpers import Done, planned, tiny

from lors.config import Experiment, parse_experiment
from lors.isolate import Slots


class _Warm(Slots):
    """Children that the next flow of this process takes over: each needs seconds to start, and a test runs little.

    Trainings run in them, too: that each has a child of its own is for the tests that run commands.
    """

    made: dict[tuple[Any, ...], Slots] = {}

    def run(self, *job: Any, **options: Any) -> dict[str, Any]:
        return super().run(*job, **options | {"fresh": False})

    def close(self) -> None:
        if len(self._free) < len(self._slots):  # a run that is stopped in the middle of a step
            for key in [key for key, slots in self.made.items() if slots is self]:
                del self.made[key]
            super().close()


@pytest.fixture(scope="session", autouse=True)
def _warm_children() -> Iterator[None]:
    import flows.pipeline

    def slots(count: int, threads: int, devices: list[str]) -> Slots:
        key = (count, threads, *devices)
        return _Warm.made.get(key) or _Warm.made.setdefault(key, _Warm(count, threads, devices))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flows.pipeline, "Slots", slots)
        yield
    for left in _Warm.made.values():
        Slots.close(left)


@pytest.fixture(scope="session")
def done(prefect_api: str, tmp_path_factory: pytest.TempPathFactory) -> Done:
    from flows.pipeline import full_pipeline

    folder = tmp_path_factory.mktemp("tiny")

    def make(**changes: Any) -> Experiment:
        return parse_experiment(tiny(folder, **changes))

    before = planned(make())
    result = full_pipeline(make(resources={"parallel": 2, "threads": 1}))
    summary = json.loads((folder / "out" / "summary.json").read_text())
    return Done(prefect_api, folder, make, before, result, summary)
