"""One thin Prefect task a stage of `lors.stages`: references in, a reference out, never tensors."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from prefect import get_run_logger

from lors.pipeline import Step, run_step
from tasks.policies import artifacts_of, step_task
from tasks.runtime import current

__all__ = ["TASKS"]

# The Prefect UI's log gets a line of progress at most this often.
_LOG_SECONDS = 15.0


def _perform(step: Step, inputs: Mapping[str, Any]) -> dict[str, Any]:
    runtime, logger = current(), get_run_logger()
    told = time.monotonic()

    def on_event(event: Mapping[str, Any]) -> None:
        nonlocal told
        runtime.tell(step, event)
        if time.monotonic() - told >= _LOG_SECONDS:
            told = time.monotonic()
            logger.info("%s: %s", step.name, ", ".join(f"{name} {value}" for name, value in event.items()))

    started = time.monotonic()
    artifact, hit = run_step(step, artifacts_of(inputs), runtime.workspace, on_event)
    seconds = round(time.monotonic() - started, 3)
    if not hit:
        with runtime.lock:
            runtime.computed[step.name] = seconds
    runtime.tell(step, {"finished": True, "seconds": None if hit else seconds})
    logger.info("%s %s: %s", step.name, "was in the store" if hit else "computed", dict(artifact.summary))
    return artifact.to_json()


def prepare_corpus(step: Step, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """One language's validated splits."""
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


def score_systems(step: Step, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """All scores and the table."""
    return _perform(step, inputs)


TASKS = {
    function.__name__: step_task(tag, function)
    for tag, function in (
        ("data", prepare_corpus),
        ("train", fine_tune),
        ("extract", extract_task_vector),
        ("prune", prune_task_vector),
        ("merge", combine_task_vectors),
        ("scaling", score_scaling),
        ("scaling", select_scaling),
        ("merge", write_model),
        ("evaluate", evaluate_model),
        ("evaluate", score_systems),
    )
}
"""The Prefect task of each stage."""
