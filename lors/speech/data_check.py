"""The speech of an experiment before anybody trains on it: `check` prepares it as a run would, and examines it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lors.config import Experiment
from lors.errors import CheckpointError, LorsError
from lors.isolate import Slots
from lors.pipeline import prepare_step, resolve_base
from lors.resources import shares
from lors.s3_store import open_store
from lors.speech.base_model import check_base
from lors.speech.corpus import SPLITS
from lors.speech.data_facts import (
    Overlap,
    Rows,
    SplitFacts,
    Writer,
    language_facts,
    overlaps_of_languages,
    overlaps_of_splits,
)
from lors.speech.data_findings import SEVERITIES, Finding, findings_of
from lors.steps import Step, Workspace, plan, run_step
from lors.store import Store

__all__ = ["DataReport", "check"]

Listener = Callable[[str, Mapping[str, Any]], None]
Progress = Callable[[int, int], AbstractContextManager[Listener]]


@dataclass(frozen=True, slots=True)
class DataReport:
    """All that was found; the findings are sorted, errors first."""

    base: str
    tasks: tuple[str, ...]
    splits: tuple[SplitFacts, ...]
    overlaps: tuple[Overlap, ...]
    findings: tuple[Finding, ...]

    @property
    def failed(self) -> bool:
        """Whether a run would stop."""
        return any(finding.severity == "error" for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Plain data, by the names of the fields."""
        return {"failed": self.failed, **asdict(self)}


def _silent(steps: int, cached: int) -> AbstractContextManager[Listener]:
    return nullcontext(lambda step, event: None)


def check(experiment: Experiment, progress: Progress = _silent) -> DataReport:
    """Prepare every split of every language (of guards, test) into the store, and examine what came out.

    A split that cannot be prepared is a finding, and the others are examined all the same. `progress` is called with
    the number of steps and of those cached; inside its context, the listener it gave, with a step's name and events.

    Raises InputError: the base is missing, or does not take a language or a task.
    """
    base, store = resolve_base(experiment.base), open_store(experiment.store)
    steps, findings = _steps(experiment, base, store)
    cached = {planned.step.name for planned in plan(steps, store) if planned.cached}
    facts: list[SplitFacts] = []
    overlaps: list[Overlap] = []
    tested: dict[str, list[str]] = {}
    trained: dict[str, set[str]] = {}
    with progress(2 * len(steps), len(cached)) as listener:
        writer = _writer(base)
        prepared, failures = _prepared(experiment, steps, cached, store, listener)
        for language, paths in prepared.items():
            splits = {split: Rows.read(path, language) for split, path in paths.items()}
            facts += _examined(experiment, language, splits, writer, listener)
            overlaps += overlaps_of_splits(splits)
            tested |= {language: splits["test"].english} if "test" in splits else {}
            trained |= {language: set(splits["train"].english)} if "train" in splits else {}
    if "translate" in experiment.tasks:
        overlaps += overlaps_of_languages(tested, trained)
    findings += failures
    for language in experiment.heard:
        own = [split for split in facts if split.language == language]
        shared = [overlap for overlap in overlaps if overlap.language == language]
        findings += findings_of(own, shared, experiment.tasks, language in experiment.languages)
    languages, names = experiment.heard, (*SPLITS, "")
    findings.sort(key=lambda f: (SEVERITIES.index(f.severity), languages.index(f.language), names.index(f.split)))
    return DataReport(experiment.base, experiment.tasks, tuple(facts), tuple(overlaps), tuple(findings))


def _steps(experiment: Experiment, base: Path, store: Store) -> tuple[dict[str, Step], list[Finding]]:
    """The run's steps that prepare a split; a source that is missing is a finding."""
    native = check_base(base, experiment.base, experiment.heard, experiment.tasks)
    steps: dict[str, Step] = {}
    findings = []
    wanted: list[tuple[str, str, int | None]] = []
    for language in experiment.spoken:
        splits = SPLITS if language in experiment.languages else ("test",)
        wanted += [(language, split, None) for split in splits]
    if (preserve := experiment.finetune.preserve) is not None:
        others = [language for language in experiment.held if language not in experiment.languages]
        wanted += [(language, "train", preserve.utterances) for language in others]
    for language, split, first in wanted:
        try:
            step = prepare_step(experiment, language, split, native, store, first)
            steps[step.name] = step
        except LorsError as error:
            findings.append(_failure(language, split, error))
    store.memo.save()
    return steps, findings


def _failure(language: str, split: str, error: LorsError) -> Finding:
    return Finding("error", "preparation", language, split, f"the split cannot be prepared: {error}")


def _prepared(
    experiment: Experiment, steps: Mapping[str, Step], cached: Collection[str], store: Store, listener: Listener
) -> tuple[dict[str, dict[str, Path]], list[Finding]]:
    """The file of each split by language, and why the others could not be made."""
    count, threads, devices = shares(experiment)

    def prepare(step: Step) -> Path | LorsError:
        try:
            artifact, hit = run_step(step, {}, workspace, lambda event: listener(step.name, event))
        except LorsError as error:
            return error
        if step.name not in cached:
            seconds = None if hit else float(store.manifest(artifact)["seconds"])
            listener(step.name, {"finished": True, "seconds": seconds})
        return store.path(artifact) / f"{step.settings['split']}.parquet"

    with ThreadPoolExecutor(count) as pool, Slots(count, threads, devices) as slots:
        workspace = Workspace(store, slots, threads)
        outcomes = list(pool.map(prepare, steps.values()))
    prepared: dict[str, dict[str, Path]] = {language: {} for language in experiment.heard}
    failures = []
    for step, outcome in zip(steps.values(), outcomes, strict=True):
        language, split = step.settings["language"], step.settings["split"]
        if isinstance(outcome, LorsError):
            failures.append(_failure(language, split, outcome))
        else:
            prepared[language][split] = outcome
    return prepared, failures


def _writer(base: Path) -> Writer:
    from transformers import AutoConfig, AutoTokenizer

    from lors.speech.architecture import architecture_of

    try:
        config = AutoConfig.from_pretrained(base, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"the config.json or the tokenizer in {base} cannot be read ({error}); copy them from its source again"
        ) from error
    return Writer(architecture_of(config), config, tokenizer)


def _examined(
    experiment: Experiment, language: str, splits: Mapping[str, Rows], writer: Writer, listener: Listener
) -> list[SplitFacts]:
    training, testing = experiment.finetune.training_window, experiment.evaluate.window
    windows = {"train": training, "validation": training, "test": testing}

    def tell(split: str, done: int, total: int) -> None:
        listener(f"examine {language} {split}", {"done": done, "total": total, "unit": "texts"})

    facts = language_facts(splits, writer, experiment.tasks, windows, tell)
    for split in splits:
        listener(f"examine {language} {split}", {"finished": True, "seconds": None})
    return facts
