"""One thin Prefect task a stage of `lors.stages`: references in, a reference out, never tensors."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any
from uuid import UUID

from prefect import get_run_logger
from prefect.context import TaskRunContext
from prefect.states import Completed
from prefect.tasks import Task

from lors.errors import InputError
from lors.steps import Step, run_step
from lors.store import Artifact
from lors.training.settings import LOG
from tasks.dispatch import Order, train_on_worker
from tasks.policies import artifacts_of, step_task
from tasks.runtime import Runtime, runtime_of
from tasks.training_view import TrainingView

__all__ = ["TASKS", "task_for"]

# The Prefect UI's log gets a line of progress at most this often.
_LOG_SECONDS = 15.0


def _perform(step: Step, inputs: Mapping[str, Any]) -> Any:
    context, logger = TaskRunContext.get(), get_run_logger()
    assert context is not None, "a step is performed inside its Prefect task"
    runtime = runtime_of(context.task_run)
    told = time.monotonic()
    view = TrainingView(step.name) if step.stage in ("fine_tune", "touch_up") else None

    def on_event(event: Mapping[str, Any]) -> None:
        nonlocal told
        runtime.tell(step.name, event)
        if view is not None:
            view(event)
        if time.monotonic() - told >= _LOG_SECONDS:
            told = time.monotonic()
            logger.info("%s: %s", step.name, ", ".join(f"{name} {_short(value)}" for name, value in event.items()))

    if (order := runtime.orders.get(step.name)) is not None:
        artifact, hit = _order(order, step, inputs, runtime, on_event)
    else:
        artifact, hit = run_step(step, artifacts_of(inputs), runtime.workspace, on_event)
    seconds = float(runtime.workspace.store.manifest(artifact)["seconds"])
    if not hit:
        with runtime.lock:
            runtime.computed.add(step.name)
        if view is not None:
            view.finish(runtime.workspace.store.path(artifact) / LOG)
    runtime.tell(step.name, {"finished": True, "seconds": None if hit else seconds})
    logger.info("%s %s: %s", step.name, "was in the store" if hit else "computed", dict(artifact.summary))
    # What another machine made, or Prefect has no record of, is cached all the same.
    return Completed(name="Cached", data=artifact.to_json()) if hit else artifact.to_json()


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _order(
    order: Order, step: Step, inputs: Mapping[str, Any], runtime: Runtime, on_event: Callable[[Mapping[str, Any]], None]
) -> tuple[Artifact, bool]:
    """As `run_step`, by a worker that shares the store."""
    store, key = runtime.workspace.store, step.key(artifacts_of(inputs))
    if (known := store.find(step.stage, key)) is not None:
        return known, True
    own: set[UUID] = set()

    def started(run: UUID) -> None:
        own.add(run)
        with runtime.lock:
            runtime.ordered.add(run)

    try:
        train_on_worker(order, key, on_event, started, runtime.stopping.is_set)
    finally:
        if not runtime.stopping.is_set():
            with runtime.lock:
                runtime.ordered -= own
    made = store.find(step.stage, key)
    if made is None:
        raise InputError(
            f"a worker trained {step.name}, but it is not in the store {store.root}: give the workers the same `store` "
            "and the same version of LoRS"
        )
    return made, False


def prepare_split(step: Step, inputs: Mapping[str, Any]) -> Any:
    """One validated split of a language."""
    return _perform(step, inputs)


def keep_base(step: Step, inputs: Mapping[str, Any]) -> Any:
    """The base in the store, for workers that have no other copy."""
    return _perform(step, inputs)


def fine_tune(step: Step, inputs: Mapping[str, Any]) -> Any:
    """One expert; resumes from its last checkpoint."""
    return _perform(step, inputs)


def extract_task_vector(step: Step, inputs: Mapping[str, Any]) -> Any:
    """Expert minus base."""
    return _perform(step, inputs)


def prune_task_vector(step: Step, inputs: Mapping[str, Any]) -> Any:
    """LoRS on a task vector."""
    return _perform(step, inputs)


def combine_task_vectors(step: Step, inputs: Mapping[str, Any]) -> Any:
    """All experts' task vectors as one."""
    return _perform(step, inputs)


def score_scaling(step: Step, inputs: Mapping[str, Any]) -> Any:
    """One point of the search for the scaling coefficient."""
    return _perform(step, inputs)


def select_scaling(step: Step, inputs: Mapping[str, Any]) -> Any:
    """The best of the points."""
    return _perform(step, inputs)


def write_model(step: Step, inputs: Mapping[str, Any]) -> Any:
    """The merged model's folder."""
    return _perform(step, inputs)


def add_task_vectors(step: Step, inputs: Mapping[str, Any]) -> Any:
    """One more language on top of a finished model."""
    return _perform(step, inputs)


def touch_up(step: Step, inputs: Mapping[str, Any]) -> Any:
    """The merged model, trained further; resumes from its last checkpoint."""
    return _perform(step, inputs)


def evaluate_model(step: Step, inputs: Mapping[str, Any]) -> Any:
    """One model's hypotheses on one language's test split."""
    return _perform(step, inputs)


def score_comet(step: Step, inputs: Mapping[str, Any]) -> Any:
    """COMET's scores of one system's translations."""
    return _perform(step, inputs)


def diagnose_experts(step: Step, inputs: Mapping[str, Any]) -> Any:
    """The experts' spectra and interference."""
    return _perform(step, inputs)


def score_systems(step: Step, inputs: Mapping[str, Any]) -> Any:
    """All scores and the table."""
    return _perform(step, inputs)


TASKS = {
    function.__name__: step_task(tag, function)
    for tag, function in (
        ("data", prepare_split),
        ("data", keep_base),
        ("train", fine_tune),
        ("extract", extract_task_vector),
        ("prune", prune_task_vector),
        ("merge", combine_task_vectors),
        ("scaling", score_scaling),
        ("scaling", select_scaling),
        ("merge", write_model),
        ("merge", add_task_vectors),
        ("merge", touch_up),
        ("evaluate", evaluate_model),
        ("evaluate", score_comet),
        ("evaluate", score_systems),
        ("extract", diagnose_experts),
    )
}
"""The Prefect task of each stage."""


def task_for(step: Step, cached: bool) -> Task[Any, Any]:
    """The task of a step that the store is known to have or not, with tags of its language and task.

    A cached step does no work, so it has no tag to wait for a concurrency slot of; asking costs seconds on SQLite.
    """
    made = TASKS[step.stage].with_options(name=step.name)  # what the UI calls it until it begins
    about = {f"{name}:{value}" for name, value in (("language", step.language), ("task", step.task)) if value}
    made.tags = set() if cached else made.tags | about
    return made
