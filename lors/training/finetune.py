"""Fine-tuning: a plain torch loop, batches by padded seconds, exact resume from the last checkpoint."""

from __future__ import annotations

import contextlib
import copy
import math
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from lors.errors import ConfigError, CorpusError, StepFailedError, TrainingError
from lors.groups import in_group
from lors.speech.architecture import architecture_of
from lors.training import update
from lors.training.checkpoint import LOG, Best, Checkpoint, Log, Progress, State, about, disk_errors
from lors.training.clock import Clock, finished, steps_done
from lors.training.distributed import Team, team
from lors.training.examples import Example, examples_for
from lors.training.inputs import Batch, Inputs, ahead
from lors.training.modes import checkpointed, compiled, uncompiled
from lors.training.precision import precision_for, scaler_for
from lors.training.preserve import Base, Prompts
from lors.training.schedule import learning_rate_for, rate_share
from lors.training.settings import Finetune
from lors.training.signals import stop_on_sigterm
from lors.training.weights import Parameters, adamw, swapped, trained

__all__ = [
    "LOG",
    "Example",
    "examples_for",
    "fine_tune",
    "learning_rate_for",
    "stop_on_sigterm",
    "validation_loss",
    "validation_measure",
]

Report = Callable[[Mapping[str, Any]], None]
Score = Callable[[Any], float]

# Batches whose features are computed while a GPU trains. On a CPU threads would only take turns.
_AHEAD = 4


@update.memory_errors()
def fine_tune(
    model: Any,
    train: Sequence[Example],
    validation: Sequence[Example],
    settings: Finetune,
    work: Path,
    report: Report = lambda event: None,
    *,
    score: Score | None = None,
    prompts: Prompts | None = None,
    held_to: Any | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Train `model` in place; returns figures (steps, losses, seconds, samples a second).

    Killed at any moment, the next call with the same `work` folder goes on from the last checkpoint there, and on a
    CPU with the same number of threads ends in the same weights, bit for bit, unless `settings.max_hours` ends it:
    order and random numbers depend on the seed and the step alone. `work` / `LOG` gets a line a step and a validation,
    the same for the same training; `report` gets the speed too. In each process of `lors.training.distributed.launch`
    this trains the one model of all, with the batches of one process, and the first process writes and reports.

    Args:
        score: percent error, lower is better, of the model as it is; for `settings.validation.metric: score`.
        prompts: what the utterances are asked for beside, for `settings.preserve`.
        held_to: the model that it is held to there; None: what it is at this call.
        stop: asked after each step; where it returns True, a checkpoint is written and StepFailedError raised.

    Raises:
        TrainingError: the loss or the gradient is not finite, the disk is full, or a single utterance does not fit in
            the device's memory; the last checkpoint is kept.
        ConfigError: `settings` do not fit this model, its examples or its device.
        InputError: the checkpoint in `work` is of another training, or an extra is missing.

    After an error the weights are those of some step in between: load the base again.
    """
    if not train:
        raise CorpusError("there is no example to train on: give the training split some utterances")
    measure = validation_measure(settings, validation, score)
    peak = settings.learning_rate or learning_rate_for(sum(p.numel() for p in model.parameters()))
    dtype = precision_for(settings.precision, model.device)
    base = _base(model, settings, prompts, held_to)
    speech = _inputs(
        model,
        train,
        settings.training_window,
        augment=settings.augment,
        seed=settings.seed,
        prompts=None if base is None else prompts,
    )
    us = team(model.device)
    work.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(disk_errors(work))
        parameters = stack.enter_context(trained(model, settings.freeze, settings.lora, settings.seed))
        stack.enter_context(_modes(model, settings))
        frozen = not any(in_group("encoder", name, ()) for name in parameters)
        if base is not None and frozen and _same_encoder(model, base.model):
            base = replace(base, shares_encoder=True)
        state = _start(model, parameters, settings, peak, dtype)
        checkpoint = Checkpoint(work, about(settings, train, parameters), writes=us.first)
        if message := checkpoint.load(state):
            report({"message": message})
        log = stack.enter_context(Log(work, state.progress)) if us.first else None
        together = us.model(model, unused=_drops_layers(model.config))
        run = _Run(model, together, settings, work, state, checkpoint, us, dtype, peak, base, log, report)
        ready = stack.enter_context(contextlib.closing(_ready(speech, settings, state.progress.step, us)))
        clock = Clock(settings, state.progress)
        _train(run, ready, clock, measure, stop)
        result = {"steps": state.progress.step, "learning_rate": peak, **clock.figures(), **_choose(state, work)}
    if validation and us.first:
        loss_after = validation_loss(
            model, validation, batch_seconds=settings.batch_seconds, window=settings.training_window
        )
        result["validation_loss"] = round(loss_after, 5)
    return result


@torch.no_grad()
def validation_loss(model: Any, examples: Sequence[Example], *, batch_seconds: float, window: float | str) -> float:
    """Mean cross-entropy a target token over all `examples` (not the mean of batches)."""
    model.eval()
    speech, architecture = _inputs(model, examples, window, kept_bytes=0), architecture_of(model)
    total, tokens = 0.0, 0
    for drawn in speech.once(batch_seconds):
        batch = speech.batch(drawn)
        with architecture.windowed(model, batch.window):
            total += sum(float(update.part_loss(model, part, 0.0, model.device)) for part in batch.parts)
        tokens += batch.tokens
    return total / tokens


# The loop


@dataclass(frozen=True, slots=True)
class _Run:
    """What the steps of a training share."""

    model: Any
    together: Any
    """What `Team.model` made of the model."""
    settings: Finetune
    work: Path
    state: State
    checkpoint: Checkpoint
    us: Team
    dtype: torch.dtype
    peak: float
    base: Base | None
    log: Log | None
    report: Report

    def tell(self, entry: Mapping[str, Any], **more: Any) -> None:
        """A line of the log, and an event that says more."""
        if self.log is not None:
            self.log.write(entry)
            total = self.settings.steps
            self.report({"done": self.state.progress.step, "total": total, "unit": "steps", **entry, **more})

    def save(self) -> None:
        """A checkpoint before the end: the others wait, since the first process is ended with them."""
        self.checkpoint.save(self.state)
        self.us.sum(0)


def _train(run: _Run, ready: Iterator[Batch], clock: Clock, measure: Score | None, stop: Callable[[], bool]) -> None:
    settings, progress = run.settings, run.state.progress
    while True:
        if measure is not None and _validation_due(settings, progress):
            run.tell(_validate(run, measure))
        if finished(settings, progress):
            return
        with clock.waiting():
            batch = next(ready)
        entry = _step(run, batch)
        stopping, progress.seconds = run.us.largest(stop(), clock.seconds())
        run.tell(entry, **clock.tick(batch.samples))
        if stopping:
            run.save()
            raise StepFailedError(
                f"the training was stopped after step {progress.step} of {settings.steps}: its checkpoint is written; "
                "run the same command again to go on from there"
            )
        if run.checkpoint.due():
            run.checkpoint.save(run.state)


def _step(run: _Run, batch: Batch) -> dict[str, Any]:
    """One update; its line for the log."""
    settings, state, step = run.settings, run.state, run.state.progress.step
    done = steps_done(settings, state.progress)
    rate = run.peak * rate_share(done, settings.steps, settings.warmup, settings.schedule)
    run.model.train()
    loss = _gradient(run, batch)
    norm = update.clipped_norm(state, settings.clip)
    if reason := update.not_finite(loss, norm, state.scaler):
        run.save()
        raise TrainingError(
            f"{reason} at step {step + 1} with learning rate {rate:.2g}: lower finetune.learning_rate or look at the "
            "corpus, then run again"
        )
    update.apply(state, rate, settings.ema)
    return {"step": step + 1, "loss": round(loss, 5), "learning_rate": rate}


def _gradient(run: _Run, batch: Batch) -> float:
    """`update.gradient`, in smaller parts where the device's memory runs out, in this step and in all after it."""
    progress, step = run.state.progress, run.state.progress.step + 1
    while (loss := _loss(run, parts := batch.split(progress.split))) is None:
        # The failed attempt's activations went with its error, and its gradients go here.
        run.state.optimizer.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        if run.us.size > 1:  # the others may be past this step's parts: they cannot do them again
            raise update.out_of_memory(f"the share of step {step} of one of {run.us.size} processes")
        if max(len(part.labels) for part in parts.parts) == 1:
            raise update.out_of_memory(f"a single utterance of step {step}")
        progress.split *= 2
        run.report(
            {
                "message": f"step {step} did not fit in the memory of the device: from here on batches are computed in "
                f"{progress.split} times as many parts, for the same updates; finetune.accumulate: "
                f"{run.settings.accumulate * progress.split} does so from the first step on"
            }
        )
    return loss


def _loss(run: _Run, batch: Batch) -> float | None:
    """None where the memory ran out. The caller then has no error that would hold this attempt's activations."""
    settings, state = run.settings, run.state
    update.seed_step(settings.seed, state.progress.step, run.us.rank)
    try:
        return update.gradient(
            run.model, run.together, batch, state, settings.label_smoothing, run.dtype, run.us, run.base
        )
    except torch.OutOfMemoryError:
        return None


# What a training is made of


def _inputs(model: Any, examples: Sequence[Example], window: float | str, **options: Any) -> Inputs:
    # A copy of the config: the model's own changes inside `windowed`, while another thread computes features.
    return Inputs(examples, architecture_of(model), copy.deepcopy(model.config), window, **options)


def _base(model: Any, settings: Finetune, prompts: Prompts | None, held_to: Any | None) -> Base | None:
    """What the model is held to, where it is: a copy of it as it starts, or another one."""
    if settings.preserve is None:
        return None
    if prompts is None:
        raise ConfigError("finetune.preserve: nothing says here which other prompts there are, leave it out")
    frozen = copy.deepcopy(model) if held_to is None else held_to
    return Base(frozen.eval().requires_grad_(False), settings.preserve.weight)


def _same_encoder(a: Any, b: Any) -> bool:
    own, other = a.get_encoder().state_dict(), b.get_encoder().state_dict()
    return own.keys() == other.keys() and all(torch.equal(own[name], other[name]) for name in own)


@contextlib.contextmanager
def _modes(model: Any, settings: Finetune) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if settings.gradient_checkpointing:
            stack.enter_context(checkpointed(model))
        if settings.compile:
            stack.enter_context(compiled(model))
        yield
    model.eval()


def _start(model: Any, parameters: Parameters, settings: Finetune, peak: float, dtype: torch.dtype) -> State:
    averages = {} if settings.ema is None else {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = adamw(parameters, peak, settings.weight_decay)
    return State(parameters, optimizer, averages, scaler_for(dtype, model.device), Progress())


def _ready(speech: Inputs, settings: Finetune, first: int, us: Team) -> Generator[Batch]:
    """This process's share of each batch from step `first` on."""
    batches = islice(speech.forever(settings.batch_seconds, settings.sampling_temperature), first, None)
    count = _AHEAD if us.device.type == "cuda" else 0
    return ahead(batches, lambda drawn: speech.batch(drawn, settings.accumulate, us.rank, us.size), count)


def _drops_layers(config: Any) -> bool:
    return any(getattr(config, name, 0) for name in ("encoder_layerdrop", "decoder_layerdrop"))


# Validation


def validation_measure(settings: Finetune, validation: Sequence[Example], score: Score | None) -> Score | None:
    """What tells how good a model is, the lower the better; None where `settings` want none."""
    if settings.validation is None:
        return None
    if settings.validation.metric == "score":
        if score is None:
            raise ConfigError("finetune.validation.metric: nothing computes a score here, set it to loss")
        return score
    if not (chosen := _first_of_each(validation, settings.validation.limit)):
        raise ConfigError("finetune.validation: there is no example to validate on, give the validation split some")
    return lambda model: validation_loss(
        model, chosen, batch_seconds=settings.batch_seconds, window=settings.training_window
    )


def _first_of_each(examples: Sequence[Example], limit: int | None) -> list[Example]:
    """The first `limit` examples of each group."""
    counts: Counter[str] = Counter()
    chosen = []
    for example in examples:
        counts[example.group] += 1
        if limit is None or counts[example.group] <= limit:
            chosen.append(example)
    return chosen


def _validation_due(settings: Finetune, progress: Progress) -> bool:
    assert settings.validation is not None
    if progress.step == 0:
        return settings.validation.start and progress.validated < 0
    last = steps_done(settings, progress) >= settings.steps
    return progress.step > progress.validated and (last or progress.step % settings.validation.every == 0)


def _validate(run: _Run, measure: Score) -> dict[str, Any]:
    """Validate the weights that count and keep them where they are the best so far; the entry for the log."""
    settings, state, progress = run.settings, run.state, run.state.progress
    assert settings.validation is not None

    def value_here() -> float:
        run.model.eval()
        with swapped(state.parameters, state.averages), uncompiled() if settings.compile else contextlib.nullcontext():
            return measure(run.model)

    value = run.us.of_first(value_here)
    if math.isnan(value):
        raise TrainingError(
            f"the validation at step {progress.step} gave {value}: lower finetune.learning_rate or look at the "
            "validation split, then run again"
        )
    progress.validated, progress.without_better = progress.step, progress.without_better + 1
    if progress.best_step is None or value < progress.best_value:
        progress.best_step, progress.best_value, progress.without_better = progress.step, value, 0
        if run.us.first:
            Best(run.work).save(state.chosen(), progress.step, value)
    name = f"validation_{settings.validation.metric}"
    return {"step": progress.step, name: round(value, 5), "best_step": progress.best_step}


def _choose(state: State, work: Path) -> dict[str, Any]:
    """Give the model its best weights, else the averages, where there are any; the figures for the result."""
    figures: dict[str, Any] = {"skipped_steps": state.progress.skipped} if state.scaler.is_enabled() else {}
    if state.progress.best_step is not None:
        step, value = Best(work).load(state.parameters)
        return {**figures, "best_step": step, "best_value": round(value, 5)}
    for name, average in state.averages.items():
        state.parameters[name].data.copy_(average)
    return figures
