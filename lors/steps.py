"""One step of a pipeline: its key, what is cached of it, how it is run. No torch and no Prefect here.

A step's key is the hash of its own settings, the digests of its inputs and the version of its algorithm (`VERSIONS`).
Files that a step does not read are no part of its key, so a new test split, say, trains nothing again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lors.isolate import Slots
from lors.store import Artifact, Store, step_key

__all__ = ["VERSIONS", "PlannedStep", "Source", "Step", "Workspace", "plan", "run_step"]

VERSIONS = {
    "keep_base": 1,
    "prepare_split": 1,
    "fine_tune": 2,
    "extract_task_vector": 2,
    "prune_task_vector": 2,
    "combine_task_vectors": 2,
    "score_scaling": 3,
    "select_scaling": 2,
    "write_model": 3,
    "touch_up": 1,
    "add_task_vectors": 1,
    "evaluate_model": 2,
    "score_comet": 1,
    "score_systems": 5,
    "diagnose_experts": 1,
}
"""Raised when the same settings and inputs would give another result."""


@dataclass(frozen=True, slots=True)
class Source:
    """What a step reads of an earlier one: some of its files, or all."""

    step: str
    files: tuple[str, ...] = ("*",)


@dataclass(frozen=True, slots=True)
class Step:
    """One cached unit of work."""

    name: str
    stage: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, Source] = field(default_factory=dict)
    outside: Mapping[str, str] = field(default_factory=dict)
    """Digests of what the step reads that is not in the store."""
    places: Mapping[str, Any] = field(default_factory=dict)
    """Where that lies; not part of the key, so a corpus or a base can move."""
    language: str | None = None
    task: str | None = None

    def key(self, artifacts: Mapping[str, Artifact]) -> str:
        """The step's key, from the artifact of each input (by the input's name)."""
        return step_key(self.stage, VERSIONS[self.stage], self.settings, self.input_digests(artifacts))

    def input_digests(self, artifacts: Mapping[str, Artifact]) -> dict[str, str]:
        """The digest of each input: of the files that the step reads, not of their neighbours."""
        read = {name: artifacts[name].digest_of(*source.files) for name, source in self.inputs.items()}
        return {**self.outside, **read}


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """A step and what a run would do with it."""

    step: Step
    cached: bool
    reason: str
    """Why it has to run; empty where it is cached."""
    seconds: float | None
    """What it took when it ran, where it is cached."""


@dataclass(frozen=True, slots=True)
class Workspace:
    """What steps run in: the store, and the child processes that compute them."""

    store: Store
    slots: Slots
    threads: int
    processes: int = 1
    """That train one expert together."""
    patience: float | None = None
    """Seconds without any sign of a step's process after which it is ended and tried again."""


def plan(steps: Mapping[str, Step], store: Store) -> list[PlannedStep]:
    """What a run would do with each step: take it from the store, or compute it, and why."""
    found: dict[str, Artifact] = {}
    planned = []
    for step in steps.values():
        waiting = [source.step for source in step.inputs.values() if source.step not in found]
        if waiting:
            planned.append(PlannedStep(step, False, f"after {waiting[0]}", None))
            continue
        key = step.key({name: found[source.step] for name, source in step.inputs.items()})
        artifact = store.find(step.stage, key)
        if artifact is None:
            planned.append(PlannedStep(step, False, store.why(step.stage, key) or "not made yet", None))
        else:
            found[step.name] = artifact
            planned.append(PlannedStep(step, True, "", float(store.manifest(artifact)["seconds"])))
    return planned


# Each model and each training has its child to itself: its memory is given back, its crash is its own.
_OWN_PROCESS = {"fine_tune", "touch_up"}


def run_step(
    step: Step,
    artifacts: Mapping[str, Artifact],
    workspace: Workspace,
    on_event: Callable[[Mapping[str, Any]], None] = lambda event: None,
) -> tuple[Artifact, bool]:
    """The artifact of a step, and whether it was in the store already; else it is computed in a child process."""
    store = workspace.store
    digests = step.input_digests(artifacts)
    key = step_key(step.stage, VERSIONS[step.stage], step.settings, digests)
    with store.produce(
        step.stage,
        key,
        version=VERSIONS[step.stage],
        settings=step.settings,
        inputs=digests,
        on_wait=lambda message: on_event({"message": message}),
    ) as production:
        if production.hit is not None:
            return production.hit, True
        started = 0.0

        def start() -> None:
            nonlocal started
            started = time.monotonic()

        def watch(event: Mapping[str, Any]) -> None:
            production.check()  # or two processes would train one expert
            on_event(event)

        summary = workspace.slots.run(
            f"lors.stages:{step.stage}",
            {
                "settings": dict(step.settings),
                "inputs": {name: str(store.path(artifact)) for name, artifact in artifacts.items()},
                "places": dict(step.places),
                "digests": digests,
                "out": str(production.out),
                "work": str(production.work),
                "threads": workspace.threads,
                "processes": workspace.processes,
            },
            watch,
            start,
            fresh=step.stage in _OWN_PROCESS,
            log=production.work / "log.txt",
            patience=workspace.patience,
        )
        artifact = production.publish(summary, time.monotonic() - started)
        return artifact, False
