"""The flows: one expert, the baselines, merging and evaluation, the whole pipeline, a sweep. Importing this imports
Prefect."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.context import FlowRunContext
from prefect.futures import PrefectFuture, wait
from prefect.settings import PREFECT_RESULTS_LOCAL_STORAGE_PATH
from prefect.task_runners import ThreadPoolTaskRunner

from flows.artifacts import create_run_artifacts
from flows.prefect_environment import settle
from lors.config import Experiment
from lors.errors import InputError, LorsError, StepFailedError
from lors.isolate import Slots
from lors.outputs import publish, publish_sweep, require_writable
from lors.pipeline import Step, Workspace, plan
from lors.report import write_report
from lors.resources import shares
from lors.store import Artifact, Store
from lors.sweep import Variant, build_variants, seed_variants
from tasks.runtime import Runtime, use
from tasks.steps import task_for

__all__ = ["full_pipeline", "merge_and_evaluate", "sweep", "train_baselines", "train_expert"]

# A submitted step holds a thread while it waits for its inputs; the child processes, far fewer, do the work.
_RUNNER: Any = ThreadPoolTaskRunner(max_workers=1024)

Futures = dict[str, PrefectFuture[Any]]


@flow(
    name="full-pipeline",
    flow_run_name="full-pipeline {experiment.output}",
    task_runner=_RUNNER,
)
def full_pipeline(experiment: Experiment) -> dict[str, Any]:
    """Data, experts, task vectors, pruning, merging, evaluation: computes what is not in the store yet."""
    with _runtime(experiment) as runtime:
        return _run_and_publish(seed_variants(experiment), experiment.output, runtime)


@flow(
    name="sweep",
    flow_run_name="sweep {output}",
    task_runner=_RUNNER,
)
def sweep(variants: list[Variant], output: Path) -> dict[str, Any]:
    """Variants of one experiment as one graph; what they have in common is computed once. Writes no models."""
    with _runtime(variants[0].experiment) as runtime:
        return _run_and_publish(variants, output, runtime, models=False)


@flow(
    name="train-expert",
    flow_run_name="train-expert {language}-{task}",
    task_runner=_RUNNER,
)
def train_expert(experiment: Experiment, language: str, task: str) -> dict[str, Any]:
    """One expert: prepare its corpus, fine-tune, extract and prune its task vector. Returns the last artifact (with
    `seeds`, which are all trained, that of the first)."""
    with _runtime(experiment) as runtime:
        expert = next((e for e in experiment.experts if (e.language, e.task) == (language, task)), None)
        if expert is None:
            known = ", ".join(known.id for known in experiment.experts)
            raise InputError(f"{language}-{task} is no expert of this experiment: choose from {known}")
        steps, called = build_variants(seed_variants(experiment), runtime.workspace.store)
        last = [names.get(f"prune {expert.id}", names[f"extract {expert.id}"]) for names in called]
        return _run(last, steps, runtime)[last[0]].to_json()


@flow(
    name="train-baselines",
    flow_run_name="train-baselines {experiment.output}",
    task_runner=_RUNNER,
)
def train_baselines(experiment: Experiment) -> dict[str, Any]:
    """The models of `baselines` that are trained on all languages. Returns the artifact of each (with `seeds`, which
    are all trained, that of the first)."""
    with _runtime(experiment) as runtime:
        steps, called = build_variants(seed_variants(experiment), runtime.workspace.store)
        names = {"multitask": "fine-tune multitask", "sequential": f"fine-tune sequential {experiment.order[-1]}"}
        wanted = {baseline: name for baseline, name in names.items() if baseline in experiment.baselines}
        if not wanted:
            raise InputError("the experiment's `baselines` names none that is trained: add multitask or sequential")
        artifacts = _run([own[name] for own in called for name in wanted.values()], steps, runtime)
        return {baseline: artifacts[called[0][name]].to_json() for baseline, name in wanted.items()}


@flow(
    name="merge-and-evaluate",
    flow_run_name="merge-and-evaluate {experiment.output}",
    task_runner=_RUNNER,
)
def merge_and_evaluate(experiment: Experiment) -> dict[str, Any]:
    """From experts that are in the store already: merge, search the scaling, evaluate all systems, write the output."""
    with _runtime(experiment) as runtime:
        store = runtime.workspace.store
        variants = seed_variants(experiment)
        steps, _ = build_variants(variants, store)
        for planned in plan(steps, store):
            if planned.step.stage == "fine_tune" and not planned.cached:
                raise InputError(
                    f"the model of `{planned.step.name}` is not in the store {store.root}: run train-expert (or "
                    "train-baselines) first, or the full pipeline"
                )
        return _run_and_publish(variants, experiment.output, runtime)


@contextmanager
def _runtime(experiment: Experiment) -> Iterator[Runtime]:
    for folder in (experiment.output, experiment.store):
        require_writable(folder)
    count, threads, devices = shares(experiment)
    context = FlowRunContext.get()
    assert context is not None, "called by a flow"
    assert context.flow_run is not None
    flow_run, store = context.flow_run.id, Store(experiment.store)
    slots = Slots(count, threads, devices)
    workspace = Workspace(store, slots, threads, experiment.resources.processes)
    runtime = Runtime(workspace, Path(PREFECT_RESULTS_LOCAL_STORAGE_PATH.value()))
    try:
        with slots, use(flow_run, runtime):  # `use` ends first, so that no task is tried again when its child is ended
            yield runtime
    finally:
        settle(flow_run, runtime.submitted)


def _run(names: Iterable[str], steps: Mapping[str, Step], runtime: Runtime) -> dict[str, Artifact]:
    """Submit the named steps and all they depend on; the artifact of each, by step."""
    cached = {planned.step.name for planned in plan(steps, runtime.workspace.store) if planned.cached}
    futures: Futures = {}

    def submit(name: str) -> PrefectFuture[Any]:
        if name not in futures:
            step = steps[name]
            inputs = {role: submit(source.step) for role, source in step.inputs.items()}
            futures[name] = task_for(step.stage, name in cached).submit(step=step, inputs=inputs)
            runtime.submitted += 1
        return futures[name]

    for name in names:
        submit(name)
    wait(list(futures.values()))
    _raise_first_failure(futures)
    return {name: Artifact.from_json(future.result()) for name, future in futures.items()}


def _raise_first_failure(futures: Futures) -> None:
    """All other branches have finished by now, and what they made is kept."""
    failed = {name: f.state for name, f in futures.items() if f.state.is_failed() or f.state.is_crashed()}
    if failed:
        name, state = next(iter(failed.items()))
        error = state.result(raise_on_failure=False)
        others = f" ({len(failed) - 1} more steps failed)" if len(failed) > 1 else ""
        if isinstance(error, LorsError):
            raise type(error)(f"{name}: {error}{others}") from error
        raise StepFailedError(f"{name}: {error!r}{others}; finished steps are kept, run the same command again")
    for name, future in futures.items():
        if not future.state.is_completed():
            raise StepFailedError(f"{name} did not run ({future.state.name}); run the same command again")


def _run_and_publish(
    variants: Sequence[Variant], output: Path, runtime: Runtime, *, models: bool = True
) -> dict[str, Any]:
    started, store = time.monotonic(), runtime.workspace.store
    steps, called = build_variants(variants, store)
    artifacts = _run(steps, steps, runtime)
    seconds = round(time.monotonic() - started, 1)
    summaries = []
    for variant, names in zip(variants, called, strict=True):
        own = {name: steps[there] for name, there in names.items()}
        found = {name: artifacts[there] for name, there in names.items()}
        computed = {name for name, there in names.items() if there in runtime.computed}
        experiment = variant.experiment
        summaries.append(publish(experiment, own, found, computed, store, seconds=seconds, models=models))
        write_report([experiment.output], experiment.output / "report.html")
    if variants[0].experiment.output != output:
        publish_sweep(output, list(zip(variants, summaries, strict=True)))
        write_report([output], output / "report.html")
    create_run_artifacts(output)
    return {"output": str(output), "systems": summaries[0]["systems"], "computed": sorted(runtime.computed)}
