"""What every Prefect task of a step shares: the cache key, retries, tags and names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefect import task
from prefect.cache_policies import CacheKeyFnPolicy
from prefect.context import TaskRunContext
from prefect.tasks import Task, exponential_backoff

from lors.errors import LorsError, StepFailedError, UnreachableError
from lors.store import Artifact
from tasks.runtime import runtime_of

__all__ = ["artifacts_of", "cache_key", "can_pass", "step_task"]

_RETRIES, _NETWORK_RETRIES = 2, 6
"""After 2, 4, 8, ... seconds, up to half as long again by chance; a network that is away is waited for in minutes."""


def cache_key(context: TaskRunContext, parameters: dict[str, Any]) -> str:
    """The step's own key: Prefect's cache and the store never disagree on what a result is.

    Prefect cannot see that a stored file was deleted or damaged, so its record of such a step is dropped first; and so
    is a record that is not what the store has, which Prefect would believe.
    """
    step, runtime = parameters["step"], runtime_of(context.task_run)
    key: str = step.key(artifacts_of(parameters["inputs"]))
    runtime.keep_only(key, runtime.workspace.store.find(step.stage, key))
    return key


def artifacts_of(inputs: Mapping[str, Any]) -> dict[str, Artifact]:
    """The artifacts of a task's inputs, which Prefect carries as JSON."""
    return {name: Artifact.from_json(value) for name, value in inputs.items()}


def can_pass(task: Any, task_run: Any, state: Any) -> bool:
    """Whether trying again may help: a dead process and the unforeseen, not what the user has to change.

    Nor where the run itself is ending (Ctrl-C), which is what killed the process.
    """
    try:
        runtime = runtime_of(task_run)
    except StepFailedError:
        return False
    error = state.result(raise_on_failure=False)
    if isinstance(error, LorsError) and not isinstance(error, StepFailedError):
        return False
    if task_run.run_count > _RETRIES and not isinstance(error, UnreachableError):
        return False
    runtime.tell(task_run.name, {"message": f"trying again after: {error}"})
    return True


def step_task(tag: str, function: Any) -> Task[Any, Any]:
    """`function(step, inputs)` as a Prefect task: cached by the step's key, retried with back-off, named."""
    made: Task[Any, Any] = task(
        name=function.__name__.replace("_", "-"),
        task_run_name="{step.name}",
        tags=["lors", tag],
        cache_policy=CacheKeyFnPolicy(cache_key_fn=cache_key),
        persist_result=True,
        result_serializer="json",
        retries=_NETWORK_RETRIES,
        retry_delay_seconds=exponential_backoff(backoff_factor=2),
        retry_jitter_factor=0.5,
        retry_condition_fn=can_pass,
    )(function)
    return made
