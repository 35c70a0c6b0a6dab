"""The flows: one expert, the baselines, merging and evaluation, the whole pipeline, a sweep. Importing this imports
Prefect."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext
from prefect.futures import PrefectFuture, wait
from prefect.logging import get_run_logger
from prefect.settings import PREFECT_RESULTS_LOCAL_STORAGE_PATH
from prefect.task_runners import ThreadPoolTaskRunner

from flows.artifacts import create_run_artifacts
from flows.prefect_environment import settle
from lors.changes import CANDIDATE, TOLERANCE, Change, compare_outputs, with_language, without_language
from lors.config import Experiment, load_experiment
from lors.errors import InputError, LorsError, StepFailedError, WorseError
from lors.isolate import Slots
from lors.lease import hold
from lors.network import lost_connection
from lors.outputs import publish, publish_sweep, require_no_run, require_writable, touch_up_advice
from lors.pipeline import Sources, keep_base_step, sources_of
from lors.report import write_report
from lors.resources import shares
from lors.s3_store import open_store
from lors.settings import Language, Task
from lors.speech.corpora.settings import Corpora
from lors.steps import Step, Workspace, plan
from lors.store import Artifact
from lors.sweep import Variant, build_variants, seed_variants
from tasks.dispatch import Order, require_deployments
from tasks.runtime import Runtime, use
from tasks.steps import task_for

__all__ = [
    "add_language",
    "full_pipeline",
    "merge_and_evaluate",
    "remove_language",
    "sweep",
    "train_baselines",
    "train_expert",
]

# A submitted step holds a thread while it waits for its inputs; the child processes, far fewer, do the work.
_RUNNER: Any = ThreadPoolTaskRunner(max_workers=1024)
# The results are in the output and the store. What Prefect keeps all the same, the error of a run that failed, is JSON.
_flow: Any = partial(flow, task_runner=_RUNNER, persist_result=False, result_serializer="json")

Futures = dict[str, PrefectFuture[Any]]
Place = Literal["local", "workers"]


def _run_name() -> str:
    """Such as `full-pipeline outputs/demo`."""
    context = FlowRunContext.get()
    assert context is not None
    given = context.parameters.get("experiment")
    about = context.parameters.get("file") if given is None else given.output
    return f"{context.flow.name} {about}"


@_flow(name="full-pipeline", flow_run_name=_run_name)
def full_pipeline(
    experiment: Experiment | None = None,
    file: Path | None = None,
    dispatch: Place | None = None,
    changes: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Data, experts, task vectors, pruning, merging, evaluation: computes what is not in the store yet.

    Args:
        experiment: The experiment itself, in place of a file.
        file: The experiment's YAML file, as the worker sees it.
        dispatch: Where models are trained, in place of what the experiment says.
        changes: Settings in place of the file's, such as prune.rank_ratio=0.2.
    """
    before = _given(experiment, file, changes)
    with _runtime(before, before.output) as runtime:
        now = _on(_given(experiment, file, changes), dispatch)  # who had the output before may have changed the file
        return _run_and_publish(seed_variants(now), now.output, runtime)


@_flow(name="sweep", flow_run_name="sweep {output}")
def sweep(variants: list[Variant], output: Path) -> dict[str, Any]:
    """Variants of one experiment as one graph; what they have in common is computed once. Writes no models."""
    with _runtime(variants[0].experiment, output) as runtime:
        return _run_and_publish(variants, output, runtime, models=False)


@_flow(name="train-expert", flow_run_name="train {language}-{task}")
def train_expert(
    language: Language,
    task: Task,
    experiment: Experiment | None = None,
    file: Path | None = None,
    sources: Sources | None = None,
) -> dict[str, Any]:
    """One expert: prepare its corpus, fine-tune, extract and prune its task vector. Returns the last artifact (with
    `seeds`, which are all trained, that of the first).

    Args:
        language: Whisper's code of the expert's language.
        task: What the expert does: transcribe, or translate into English.
        experiment: The experiment that the expert is of, in place of a file.
        file: The experiment's YAML file, as the worker sees it.
        sources: What the dispatching run read of the base and the corpora; none: they are read here.
    """
    experiment = _given(experiment, file)
    if experiment.seeds is None and experiment.resources.parallel == "auto":
        alone = experiment.resources.model_copy(update={"parallel": 1})  # all cores for the one training
        experiment = experiment.model_copy(update={"resources": alone})
    with _runtime(experiment, None) as runtime:
        expert = next((e for e in experiment.experts if (e.language, e.task) == (language, task)), None)
        if expert is None:
            known = ", ".join(known.id for known in experiment.experts)
            raise InputError(f"{language}-{task} is no expert of this experiment: choose from {known}")
        steps, called = build_variants(seed_variants(experiment), runtime.workspace.store, sources)
        last = [names.get(f"prune {expert.id}", names[f"extract {expert.id}"]) for names in called]
        return _run(last, steps, runtime)[last[0]].to_json()


@_flow(name="train-baselines", flow_run_name="train baselines")
def train_baselines(experiment: Experiment, sources: Sources | None = None) -> dict[str, Any]:
    """The models of `baselines` that are trained on all languages. Returns the artifact of each (with `seeds`, which
    are all trained, that of the first).

    Args:
        experiment: The experiment; its `baselines` say which.
        sources: What the dispatching run read of the base and the corpora; none: they are read here.
    """
    with _runtime(experiment, None) as runtime:
        steps, called = build_variants(seed_variants(experiment), runtime.workspace.store, sources)
        names = {one: f"fine-tune {one}" for one in ("multitask", "multitask_held")}
        names["sequential"] = f"fine-tune sequential {experiment.order[-1]}"
        wanted = {baseline: name for baseline, name in names.items() if baseline in experiment.baselines}
        if not wanted:
            raise InputError(f"the experiment's `baselines` names none that is trained: add one of {', '.join(names)}")
        artifacts = _run([own[name] for own in called for name in wanted.values()], steps, runtime)
        return {baseline: artifacts[called[0][name]].to_json() for baseline, name in wanted.items()}


@_flow(name="merge-and-evaluate", flow_run_name=_run_name)
def merge_and_evaluate(experiment: Experiment | None = None, file: Path | None = None) -> dict[str, Any]:
    """From experts that are in the store already: merge, search the scaling, evaluate all systems, write the output.

    Args:
        experiment: The experiment itself, in place of a file.
        file: The experiment's YAML file, as the worker sees it.
    """
    before = _given(experiment, file)
    with _runtime(before, before.output) as runtime:
        experiment = _given(experiment, file)
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


@_flow(name="add-language", flow_run_name="add {language}")
def add_language(
    file: Path,
    language: Language,
    corpora: Corpora | None = None,
    tolerance: float = TOLERANCE,
    accept: bool = False,
    dispatch: Place | None = None,
    afresh: bool = False,
) -> dict[str, Any]:
    """One more language: trains its experts, merges, evaluates, and takes the new model where no language got worse.

    Args:
        file: The experiment's YAML file, as the worker sees it; it gets the language when the new model is taken.
        language: Whisper's code of the new language.
        corpora: Where its speech comes from, if not from where the others' comes.
        tolerance: Points of WER, CER or BLEU that a language may lose.
        accept: Take the new model whatever got worse.
        dispatch: Where models are trained, in place of what the experiment says.
        afresh: Merge and touch up all languages anew, where the language would be added to the touched-up model.
    """
    given = None if corpora is None else corpora.model_dump(mode="json", exclude_unset=True)

    def change() -> Change:
        made = with_language(file, language, given, afresh)
        return replace(made, after=_on(made.after, dispatch))

    return _change(change, f"add-language {language}", tolerance, accept)


@_flow(name="remove-language", flow_run_name="remove {language}")
def remove_language(
    file: Path, language: Language, tolerance: float = TOLERANCE, accept: bool = False
) -> dict[str, Any]:
    """One language less: merges the other experts, evaluates, and takes the new model where no other got worse.

    Args:
        file: The experiment's YAML file, as the worker sees it; it loses the language when the new model is taken.
        language: Whisper's code of the language to leave out.
        tolerance: Points of WER, CER or BLEU that another language may lose.
        accept: Take the new model whatever got worse.
    """
    return _change(lambda: without_language(file, language), f"remove-language {language}", tolerance, accept)


def _change(make: Callable[[], Change], how: str, tolerance: float, accept: bool) -> dict[str, Any]:
    """Compute the changed experiment beside the current model, and put it in its place where that loses nothing."""
    if not math.isfinite(tolerance):
        raise InputError(f"the tolerance {tolerance} is not a number of points")
    before = make().after
    with _runtime(before, before.output) as runtime:
        change = make()  # who had the output before may have changed the file
        experiment, trial = change.after, change.after.output / CANDIDATE
        beside = experiment.model_copy(update={"output": trial})
        result = _run_and_publish(seed_variants(beside), trial, runtime)
        table, worse = compare_outputs(experiment.output, trial, change.kept, tolerance)
        create_markdown_artifact(table, key="lors-change", description=f"{how}: before and after")
        if worse and not accept:
            raise WorseError(
                f"{how}: {', '.join(worse)} got worse by more than {tolerance:g} points, so {experiment.output} still "
                f"has the old model and {change.file} the old languages; the new model is in {trial}. Take it anyway "
                f"with --accept, or set another --tolerance; nothing is computed again.\n\n{table}"
            )
        result = _run_and_publish(seed_variants(experiment), experiment.output, runtime, how=how)
        shutil.rmtree(trial, ignore_errors=True)
        try:
            make().write()  # the file as it is by now, with what was edited meanwhile
        except InputError as error:
            raise InputError(
                f"{how}: {experiment.output} has the new model, but {change.file}, which was edited meanwhile, could "
                f"not be changed: before it is run again, give it languages: [{', '.join(experiment.languages)}], as "
                f"{experiment.output / 'experiment.yaml'} has it ({error})"
            ) from error
    return {**result, "table": table, "worse": worse, "file": str(change.file)}


def _on(experiment: Experiment, place: Place | None) -> Experiment:
    return experiment if place is None else experiment.model_copy(update={"dispatch": place})


def _given(experiment: Experiment | None, file: Path | None, changes: Sequence[str] = ()) -> Experiment:
    if (experiment is None) == (file is None):
        raise InputError("give the flow either an experiment or the file of one")
    if file is not None:
        return load_experiment(file, changes)
    if changes:
        raise InputError("the flow's `changes` are of a file's settings: put them into the experiment itself")
    assert experiment is not None
    return experiment


@contextmanager
def _runtime(experiment: Experiment, output: Path | None) -> Iterator[Runtime]:
    """What the flow's tasks work with; one flow at a time has the `output`, where it writes one."""
    context = FlowRunContext.get()
    assert context is not None, "called by a flow"
    assert context.flow_run is not None
    flow_run, store = context.flow_run.id, open_store(experiment.store)
    if "lors" not in context.flow_run.tags:  # no deployment's
        with get_client(sync_client=True) as client:
            client.update_flow_run(flow_run, tags=[*context.flow_run.tags, "lors"])
    for folder in (store.root,) if output is None else (output, store.root):
        require_writable(folder)
    count, threads, devices = shares(experiment)
    slots = Slots(count, threads, devices)
    stall = experiment.resources.stall_minutes
    patience = None if stall is None else 60 * stall
    workspace = Workspace(store, slots, threads, experiment.resources.processes, patience)
    runtime = Runtime(workspace, Path(PREFECT_RESULTS_LOCAL_STORAGE_PATH.value()))
    try:
        # `use` ends first, so that no task is tried again when its child is ended.
        with slots, _alone(output, runtime), use(flow_run, runtime):
            yield runtime
    finally:
        settle(flow_run, runtime.submitted)


@contextmanager
def _alone(output: Path | None, runtime: Runtime) -> Iterator[None]:
    """Have the output for oneself; without one, nothing."""
    if output is None:
        yield
        return

    def on_wait(message: str) -> None:
        get_run_logger().info(message)
        runtime.tell("output", {"message": message})

    with hold(output / ".lock", f"the output {output}", on_wait=on_wait) as lease:
        runtime.check = lease.check
        yield


def _orders(
    variants: Sequence[Variant], steps: Mapping[str, Step], called: Sequence[Mapping[str, str]], runtime: Runtime
) -> dict[str, Order]:
    """What workers train of the steps that are not in the store yet, by step."""
    store = runtime.workspace.store
    waiting = {p.step.name for p in plan(steps, store) if p.step.stage == "fine_tune" and not p.cached}
    if variants[0].experiment.dispatch == "local" or not waiting:
        return {}
    base = None
    if variants[0].experiment.base != "starter":
        keep = keep_base_step(variants[0].experiment, store)
        base = _run([keep.name], {keep.name: keep}, runtime)[keep.name]
    orders: dict[str, Order] = {}
    for variant, names in zip(variants, called, strict=True):
        # What training does not read, the worker need not have.
        evaluate = variant.experiment.evaluate.model_copy(update={"comet": None})
        place = variant.experiment.store
        place = place.absolute() if isinstance(place, Path) else place
        own = variant.experiment.model_copy(update={"dispatch": "local", "store": place, "evaluate": evaluate})
        sources = sources_of({name: steps[there] for name, there in names.items()}, base)
        for name, there in names.items():
            if there not in waiting or there in orders:
                continue
            step, experiment = steps[there], own
            if step.language is not None and step.task is not None:
                deployment, about = "train-expert/train-expert", {"language": step.language, "task": step.task}
            else:
                deployment, about = "train-baselines/train-baselines", {}
                one = name.split()[1]  # of fine-tune sequential LANGUAGE, say
                experiment = own.model_copy(update={"baselines": (one,)})
            parameters = {
                "experiment": experiment.model_dump(mode="json", exclude_unset=True),
                "sources": sources.model_dump(mode="json"),
                **about,
            }
            tags = ("lors", "train", *(f"{key}:{value}" for key, value in about.items()))
            orders[there] = Order(deployment, parameters, there.replace("fine-tune", "train", 1), tags)
    require_deployments({order.deployment for order in orders.values()})
    return orders


def _run(names: Iterable[str], steps: Mapping[str, Step], runtime: Runtime) -> dict[str, Artifact]:
    """Submit the named steps and all they depend on; the artifact of each, by step."""
    cached = {planned.step.name for planned in plan(steps, runtime.workspace.store) if planned.cached}
    futures: Futures = {}

    def submit(name: str) -> PrefectFuture[Any]:
        if name not in futures:
            step = steps[name]
            inputs = {role: submit(source.step) for role, source in step.inputs.items()}
            futures[name] = task_for(step, name in cached).submit(step=step, inputs=inputs)
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
        if isinstance(error, Exception) and lost_connection(error):
            raise error  # for `outlast`
        raise StepFailedError(f"{name}: {error!r}{others}; finished steps are kept, run the same command again")
    for name, future in futures.items():
        if not future.state.is_completed():
            raise StepFailedError(f"{name} did not run ({future.state.name}); run the same command again")


def _run_and_publish(
    variants: Sequence[Variant], output: Path, runtime: Runtime, *, models: bool = True, how: str = "run"
) -> dict[str, Any]:
    require_no_run(variants, output)
    started, store = time.monotonic(), runtime.workspace.store
    steps, called = build_variants(variants, store)
    runtime.orders = _orders(variants, steps, called, runtime)
    artifacts = _run(steps, steps, runtime)
    seconds = round(time.monotonic() - started, 1)
    runtime.check()
    summaries, advice = [], []
    for variant, names in zip(variants, called, strict=True):
        own = {name: steps[there] for name, there in names.items()}
        found = {name: artifacts[there] for name, there in names.items()}
        computed = {name for name, there in names.items() if there in runtime.computed}
        experiment = variant.experiment
        summaries.append(publish(experiment, own, found, computed, store, seconds=seconds, models=models, how=how))
        write_report([experiment.output], experiment.output / "report.html")
        touched = found["touch up"].summary if "touch up" in found else {}
        if said := touch_up_advice(experiment, touched):
            advice.append(f"{experiment.output}: {said}")
            get_run_logger().warning(advice[-1])
    if variants[0].experiment.output != output:
        publish_sweep(output, list(zip(variants, summaries, strict=True)))
        write_report([output], output / "report.html")
    create_run_artifacts(output)
    return {
        "output": str(output),
        "systems": summaries[0]["systems"],
        "computed": sorted(runtime.computed),
        "steps": len(steps),
        "advice": advice,
    }
