"""One thin Prefect task a stage of `lors.stages`: references in, a reference out, never tensors."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from prefect import get_run_logger
from prefect.context import TaskRunContext
from prefect.tasks import Task

from lors.pipeline import Step, run_step
from lors.training.settings import LOG
from tasks.policies import artifacts_of, step_task
from tasks.runtime import runtime_of
from tasks.training_view import TrainingView

__all__ = ["TASKS", "task_for"]

# The Prefect UI's log gets a line of progress at most this often.
_LOG_SECONDS = 15.0


def _perform(step: Step, inputs: Mapping[str, Any]) -> dict[str, Any]:
    context, logger = TaskRunContext.get(), get_run_logger()
    assert context is not None, "a step is performed inside its Prefect task"
    runtime = runtime_of(context.task_run)
    told = time.monotonic()
    view = TrainingView(step.name) if step.stage == "fine_tune" else None

    def on_event(event: Mapping[str, Any]) -> None:
        nonlocal told
        runtime.tell(step.name, event)
        if view is not None:
            view(event)
        if time.monotonic() - told >= _LOG_SECONDS:
            told = time.monotonic()
            logger.info("%s: %s", step.name, ", ".join(f"{name} {value}" for name, value in event.items()))

    artifact, hit = run_step(step, artifacts_of(inputs), runtime.workspace, on_event)
    seconds = float(runtime.workspace.store.manifest(artifact)["seconds"])
    if not hit:
        with runtime.lock:
            runtime.computed.add(step.name)
        if view is not None:
            view.finish(runtime.workspace.store.path(artifact) / LOG)
    runtime.tell(step.name, {"finished": True, "seconds": None if hit else seconds})
    logger.info("%s %s: %s", step.name, "was in the store" if hit else "computed", dict(artifact.summary))
    return artifact.to_json()


def prepare_split(step: Step, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """One validated split of a language."""
    return _perform(step, inputs)


def fine_tune(step: Step, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """One expert; resumes from its last checkpoint."""
    return _perform(step, inputs)


def extract_task_vector(step: Step, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Expert minus base."""
    return _perform(step, inputs)


def prune_task_vector(step: Step, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """LoRS on a task vector."""
    return _perform(step, inputs)


def combine_task_vectors(step: Step, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """All experts' task vectors as one."""
    return _perform(step, inputs)


def score_scaling(step: Step, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """One point of the search for the scaling coefficient."""
    return _perform(step, inputs)


def select_scaling(step: Step, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The best of the points."""
    return _perform(step, inputs)


def write_model(step: Step, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The merged model's folder."""
    return _perform(step, inputs)


def evaluate_model(step: Step, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """One model's hypotheses on one language's test split."""
    return _perform(step, inputs)


def score_comet(step: Step, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """COMET's scores of one system's translations."""
    return _perform(step, inputs)


def diagnose_experts(step: Step, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The experts' spectra and interference."""
    return _perform(step, inputs)


def score_systems(step: Step, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """All scores and the table."""
    return _perform(step, inputs)


TASKS = {
    function.__name__: step_task(tag, function)
    for tag, function in (
        ("data", prepare_split),
        ("train", fine_tune),
        ("extract", extract_task_vector),
        ("prune", prune_task_vector),
        ("merge", combine_task_vectors),
        ("scaling", score_scaling),
        ("scaling", select_scaling),
        ("merge", write_model),
        ("evaluate", evaluate_model),
        ("evaluate", score_comet),
        ("evaluate", score_systems),
        ("extract", diagnose_experts),
    )
}
"""The Prefect task of each stage."""


def task_for(stage: str, cached: bool) -> Task[Any, Any]:
    """The task of a stage, for a step that the store is known to have or not.

    A cached step does no work, so it has no tag to wait for a concurrency slot of; asking costs seconds on SQLite.
    """
    return _CACHED[stage] if cached else TASKS[stage]


def _untagged(made: Task[Any, Any]) -> Task[Any, Any]:
    copy = made.with_options()
    copy.tags = set()
    return copy


_CACHED = {stage: _untagged(made) for stage, made in TASKS.items()}
