"""Fine-tuning: a plain torch loop, batches by padded seconds, exact resume from the last checkpoint."""

from __future__ import annotations

import contextlib
import difflib
import errno
import fnmatch
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lors.errors import ConfigError, TrainingError
from lors.speech.corpus import Utterance
from lors.speech.features import FRAMES_PER_SECOND, MelCache, native_window, window_for, windowed
from lors.speech.transcribe import require_language

__all__ = ["LOG", "Example", "TrainingSettings", "examples_for", "fine_tune", "learning_rate_for", "validation_loss"]

Report = Callable[[Mapping[str, Any]], None]

_CHECKPOINT = "checkpoint.safetensors"
LOG = "train.jsonl"
# Utterances of this many batches are sorted by length together: little padding, and batches still differ by epoch.
_SORTED_BATCHES = 32
# A checkpoint costs time: at most one a minute, and never more than 5 % of the time spent training.
_CHECKPOINT_SECONDS, _CHECKPOINT_SHARE = float(os.environ.get("LORS_CHECKPOINT_SECONDS", "60")), 0.05


class TrainingSettings(Protocol):
    """What the loop reads of the experiment's `finetune` section; see `lors.config.Finetune` for meanings and units."""

    @property
    def steps(self) -> int: ...
    @property
    def learning_rate(self) -> float | None: ...
    @property
    def batch_seconds(self) -> float: ...
    @property
    def window(self) -> float | str: ...
    @property
    def warmup(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def clip(self) -> float: ...
    @property
    def freeze(self) -> Sequence[str]: ...
    @property
    def precision(self) -> str: ...
    @property
    def seed(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Example:
    """One training target: an utterance and the tokens the decoder must produce after `<|startoftranscript|>`."""

    utterance: Utterance
    labels: tuple[int, ...]


def examples_for(
    utterances: Sequence[Utterance], tokenizer: Any, language: str, task: str, limit: int
) -> list[Example]:
    """Examples of one (language, task): `<|language|><|task|><|notimestamps|> text <|endoftext|>`.

    `language` is the spoken one for both tasks. Utterances without a target (no translation) or with more than `limit`
    tokens are left out. A leading space is kept before the text, as in Whisper's own training. Raises InputError where
    the tokenizer lacks the language.
    """
    require_language(tokenizer, language)
    prefix = [tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in (language, task, "notimestamps")]
    out = []
    for utterance in utterances:
        text = utterance.target(task)
        if text is None:
            continue
        ids = tokenizer(" " + text.strip(), add_special_tokens=False).input_ids
        if len(prefix) + len(ids) < limit:
            out.append(Example(utterance, (*prefix, *ids, tokenizer.eos_token_id)))
    return out


def learning_rate_for(parameters: int) -> float:
    """Pre-training's peak learning rate divided by 40, by the size of the Whisper model (OpenAI's recipe)."""
    for limit, rate in ((50e6, 3.75e-5), (100e6, 2.5e-5), (400e6, 1.25e-5), (1e9, 6.25e-6)):
        if parameters < limit:
            return rate
    return 5e-6


def _batches(
    examples: Sequence[Example], batch_seconds: float, window: Callable[[float], float], seed: str
) -> list[list[int]]:
    """One epoch: indices in batches whose (count x window) stays within `batch_seconds`, in a seeded order."""
    rng = random.Random(seed)
    order = list(range(len(examples)))
    rng.shuffle(order)
    typical = window(max(e.utterance.seconds for e in examples))
    pool = max(1, _SORTED_BATCHES * int(batch_seconds / typical))
    batches: list[list[int]] = []
    for start in range(0, len(order), pool):
        group = sorted(order[start : start + pool], key=lambda i: (examples[i].utterance.seconds, i))
        batch: list[int] = []
        for i in group:
            if batch and (len(batch) + 1) * window(examples[i].utterance.seconds) > batch_seconds:
                batches.append(batch)
                batch = []
            batch.append(i)
        batches.append(batch)
    rng.shuffle(batches)
    return batches


def _schedule(
    examples: Sequence[Example], settings: TrainingSettings, window: Callable[[float], float]
) -> Iterator[list[int]]:
    epoch = 0
    while True:
        yield from _batches(examples, settings.batch_seconds, window, f"{settings.seed}-{epoch}")
        epoch += 1


def _labels(batch: Sequence[Example], device: torch.device) -> Tensor:
    """(B, T) with -100, which the loss ignores, after each target's end."""
    longest = max(len(e.labels) for e in batch)
    rows = [list(e.labels) + [-100] * (longest - len(e.labels)) for e in batch]
    return torch.tensor(rows, device=device)


def _loss(model: Any, batch: Sequence[Example], mels: MelCache, window: Callable[[float], float]) -> Tensor:
    """Mean cross-entropy a token of the batch, in one window that fits its longest utterance."""
    with windowed(model, window(max(e.utterance.seconds for e in batch))) as frames:
        features = mels.batch([e.utterance for e in batch], frames).to(model.device)
        loss: Tensor = model(input_features=features, labels=_labels(batch, model.device), use_cache=False).loss
        return loss


def _windows(model: Any, setting: float | str, examples: Sequence[Example]) -> Callable[[float], float]:
    native = native_window(model.config)
    longest = max((e.utterance for e in examples), key=lambda utterance: utterance.seconds)
    window = window_for(longest.seconds, native, setting)
    if longest.seconds > window + 1 / FRAMES_PER_SECOND:
        raise ConfigError(
            f"utterance {longest.id} lasts {longest.seconds:.1f} s, more than the window of {window:g} s: widen the "
            f"window (the base takes {native:g} s at most) or lower corpora.max_seconds"
        )
    return lambda seconds: window_for(seconds, native, setting)


@torch.no_grad()
def validation_loss(model: Any, examples: Sequence[Example], *, batch_seconds: float, window: float | str) -> float:
    """Mean cross-entropy a target token over all `examples` (not the mean of batches)."""
    model.eval()
    policy = _windows(model, window, examples)
    mels = MelCache(model.config.num_mel_bins, max_bytes=0)
    total, tokens = 0.0, 0
    for indices in _batches(examples, batch_seconds, policy, "validation"):
        batch = [examples[i] for i in indices]
        count = sum(len(e.labels) for e in batch)
        total += float(_loss(model, batch, mels, policy)) * count
        tokens += count
    return total / tokens


def _precision(setting: str, device: torch.device) -> torch.dtype:
    cuda = device.type == "cuda"
    if setting == "auto":
        return torch.bfloat16 if cuda and torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if setting == "bf16":
        able = (
            torch.cuda.is_bf16_supported(including_emulation=False)
            if cuda
            else torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        )
        if not able:  # measured without AVX512-BF16 or AMX: 17 to 34 times slower than fp32
            raise ConfigError(
                f"finetune.precision: this {'GPU' if cuda else 'CPU'} only emulates bf16, many times slower than fp32: "
                "set auto or fp32"
            )
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[setting]


class _Checkpoint:
    """Weights, optimizer moments and the step in one safetensors file, replaced atomically."""

    def __init__(self, work: Path) -> None:
        self.path = work / _CHECKPOINT
        self._last, self._cost = time.monotonic(), 0.0

    def due(self) -> bool:
        return time.monotonic() - self._last >= max(_CHECKPOINT_SECONDS, self._cost / _CHECKPOINT_SHARE)

    def save(self, step: int, parameters: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        start = time.monotonic()
        tensors: dict[str, Tensor] = {}
        for name, parameter in parameters.items():
            tensors[f"weight/{name}"] = parameter.detach().cpu().contiguous()
            for kind, value in optimizer.state[parameter].items():  # its own step count, exp_avg and exp_avg_sq
                tensors[f"{kind}/{name}"] = value.cpu().contiguous()
        temporary = self.path.with_suffix(".partial")
        try:
            save_file(tensors, temporary, metadata={"step": str(step)})
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(self.path)
        finally:
            temporary.unlink(missing_ok=True)
        self._last, self._cost = time.monotonic(), time.monotonic() - start

    def load(self, parameters: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
        """The number of finished steps, 0 where there is no checkpoint."""
        if not self.path.is_file():
            return 0
        with safe_open(self.path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - it is no mapping
                kind, _, name = key.partition("/")
                parameter = parameters[name]
                if kind == "weight":
                    parameter.data.copy_(file.get_tensor(key))
                else:  # a fused optimizer wants its step on the parameter's device too
                    optimizer.state[parameter][kind] = file.get_tensor(key).to(parameter.device)
            return int(file.metadata()["step"])


@contextlib.contextmanager
def _disk_errors(work: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise TrainingError(
            f"the training's checkpoint and log could not be written to {work} ({error}): free some space and run the "
            "same command again, it goes on from the last checkpoint"
        ) from error


def _shorten(log: Path, steps: int) -> None:
    """Drop the lines of the steps that a resumed run does again, with the half line that a full disk may leave."""
    if log.exists():
        lines = log.read_bytes().splitlines(keepends=True)
        os.truncate(log, sum(map(len, lines[:steps])))


def _trainable(model: Any, freeze: Sequence[str]) -> dict[str, torch.nn.Parameter]:
    named = dict(model.named_parameters())
    for pattern in freeze:
        frozen = fnmatch.filter(named, pattern)
        if not frozen:
            close = difflib.get_close_matches(pattern, named, n=1, cutoff=0)
            raise ConfigError(f"finetune.freeze: {pattern!r} fits no parameter of the base, such as {close[0]!r}")
        for name in frozen:
            named[name].requires_grad_(False)
    parameters = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
    if not parameters:
        raise ConfigError(f"finetune.freeze {list(freeze)} leaves nothing to train: freeze fewer parameters")
    return parameters


def fine_tune(
    model: Any,
    train: Sequence[Example],
    validation: Sequence[Example],
    settings: TrainingSettings,
    work: Path,
    report: Report = lambda event: None,
) -> dict[str, Any]:
    """Train `model` in place for `settings.steps` updates; returns figures (losses, seconds, samples a second).

    AdamW (beta 0.9, 0.98), linear warm-up and linear decay to 0, gradient norm clipped. Killed at any moment, the next
    call with the same `work` folder goes on from the last checkpoint there, and on a CPU with the same number of
    threads ends in the same weights, bit for bit: order and random numbers depend on the seed and the step alone.
    `work` / `LOG` gets a line a step (loss, learning rate), the same for the same training; `report` gets the speed
    too.

    Raises:
        TrainingError: the loss is not finite, or the disk is full; the last checkpoint is kept.
        ConfigError: `settings` do not fit this model, its examples or its device.
    """
    device = model.device
    dtype = _precision(settings.precision, device)
    parameters = _trainable(model, settings.freeze)
    peak = settings.learning_rate or learning_rate_for(sum(p.numel() for p in model.parameters()))
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=peak, betas=(0.9, 0.98), eps=1e-6, weight_decay=settings.weight_decay, fused=True
    )
    warmup = max(1, round(settings.warmup * settings.steps))
    policy = _windows(model, settings.window, train)
    mels = MelCache(model.config.num_mel_bins)
    work.mkdir(parents=True, exist_ok=True)
    checkpoint = _Checkpoint(work)
    first = checkpoint.load(parameters, optimizer)
    started = time.monotonic()
    samples = 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(_disk_errors(work))
        _shorten(work / LOG, first)
        log = stack.enter_context((work / LOG).open("a"))
        if dtype != torch.float32:
            stack.enter_context(torch.autocast(device.type, dtype))
        for step, indices in enumerate(_schedule(train, settings, policy)):
            if step >= settings.steps:
                break
            if step < first:
                continue
            model.train()
            # Dropout and layer drop, and SpecAugment (numpy), where a base has any.
            torch.manual_seed((settings.seed * 1_000_003 + step) % 2**63)
            np.random.seed((settings.seed * 1_000_003 + step) % 2**32)
            rate = peak * min((step + 1) / warmup, (settings.steps - step) / max(1, settings.steps - warmup))
            for group in optimizer.param_groups:
                group["lr"] = rate
            batch = [train[i] for i in indices]
            loss = _loss(model, batch, mels, policy)
            value = float(loss.detach())
            if not math.isfinite(value):
                raise TrainingError(
                    f"the loss became {value} at step {step + 1} with learning rate {rate:.2g}: lower "
                    "finetune.learning_rate or look at the corpus, then run again"
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            norm = torch.nn.utils.clip_grad_norm_(list(parameters.values()), settings.clip)
            if not torch.isfinite(norm):
                raise TrainingError(
                    f"the gradient became {float(norm)} at step {step + 1} with learning rate {rate:.2g}: lower "
                    "finetune.learning_rate, then run again"
                )
            optimizer.step()
            samples += len(batch)
            entry = {"step": step + 1, "loss": round(value, 5), "learning_rate": rate}
            log.write(json.dumps(entry) + "\n")
            log.flush()
            speed = round(samples / (time.monotonic() - started), 2)
            report({"done": step + 1, "total": settings.steps, "unit": "steps", **entry, "samples_per_second": speed})
            if checkpoint.due() and step + 1 < settings.steps:
                checkpoint.save(step + 1, parameters, optimizer)
    seconds = time.monotonic() - started
    result = {
        "steps": settings.steps,
        "learning_rate": peak,
        "samples_per_second": round(samples / max(seconds, 1e-9), 2),
    }
    if validation:
        loss_after = validation_loss(model, validation, batch_seconds=settings.batch_seconds, window=settings.window)
        result["validation_loss"] = round(loss_after, 5)
    return result
