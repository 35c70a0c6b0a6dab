"""Fine-tuning: a plain torch loop, batches by padded seconds, exact resume from the last checkpoint."""

from __future__ import annotations

import contextlib
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

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lors.errors import TrainingError
from lors.speech.corpus import Utterance
from lors.speech.features import MelCache, native_window, window_for, windowed

__all__ = ["LOG", "Example", "TrainingSettings", "examples_for", "fine_tune", "learning_rate_for", "validation_loss"]

Report = Callable[[Mapping[str, Any]], None]

_CHECKPOINT = "checkpoint.safetensors"
LOG = "train.jsonl"
# Utterances of this many batches are sorted by length together: little padding, and batches still differ by epoch.
_SORTED_BATCHES = 32
# A checkpoint costs time: at most one a minute, and never more than 5 % of the time spent training.
_CHECKPOINT_SECONDS, _CHECKPOINT_SHARE = 60.0, 0.05


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
    tokens are left out. A leading space is kept before the text, as in Whisper's own training.
    """
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


def _windows(model: Any, setting: float | str) -> Callable[[float], float]:
    native = native_window(model.config)
    return lambda seconds: window_for(seconds, native, setting)


@torch.no_grad()
def validation_loss(
    model: Any, examples: Sequence[Example], *, batch_seconds: float, window: float | str, mels: MelCache | None = None
) -> float:
    """Mean cross-entropy a target token over all `examples` (not the mean of batches)."""
    model.eval()
    policy = _windows(model, window)
    mels = mels or MelCache(model.config.num_mel_bins, max_bytes=0)
    total, tokens = 0.0, 0
    for indices in _batches(examples, batch_seconds, policy, "validation"):
        batch = [examples[i] for i in indices]
        count = sum(len(e.labels) for e in batch)
        total += float(_loss(model, batch, mels, policy)) * count
        tokens += count
    return total / tokens


def _precision(setting: str, device: torch.device) -> torch.dtype:
    if setting == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
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
            for moment in ("exp_avg", "exp_avg_sq"):
                tensors[f"{moment}/{name}"] = optimizer.state[parameter][moment].cpu().contiguous()
        temporary = self.path.with_suffix(".partial")
        try:
            save_file(tensors, temporary, metadata={"step": str(step)})
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(self.path)
        except Exception as error:
            temporary.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno != errno.ENOSPC and "space" not in str(error):
                raise
            raise TrainingError(
                f"the checkpoint of step {step} could not be written to {self.path.parent} ({error}): free some space and "
                "run the same command again, it goes on from the last checkpoint"
            ) from error
        self._last, self._cost = time.monotonic(), time.monotonic() - start

    def load(self, parameters: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
        """The number of finished steps, 0 where there is no checkpoint."""
        if not self.path.is_file():
            return 0
        with safe_open(self.path, framework="pt") as file:
            step = int(file.metadata()["step"])
            for name, parameter in parameters.items():
                parameter.data.copy_(file.get_tensor(f"weight/{name}"))
                state: dict[str, Any] = optimizer.state[parameter]
                # A fused optimizer wants its step on the parameter's device.
                state["step"] = torch.tensor(float(step), device=parameter.device)
                for moment in ("exp_avg", "exp_avg_sq"):
                    state[moment] = file.get_tensor(f"{moment}/{name}").to(parameter.device)
        return step


def _trainable(model: Any, freeze: Sequence[str]) -> dict[str, torch.nn.Parameter]:
    for name, parameter in model.named_parameters():
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in freeze):
            parameter.requires_grad_(False)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise TrainingError(f"finetune.freeze {list(freeze)} leaves nothing to train: freeze fewer parameters")
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
    Raises TrainingError where the loss is not finite or the disk is full.
    """
    work.mkdir(parents=True, exist_ok=True)
    device = model.device
    dtype = _precision(settings.precision, device)
    parameters = _trainable(model, settings.freeze)
    peak = settings.learning_rate or learning_rate_for(sum(p.numel() for p in model.parameters()))
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=peak, betas=(0.9, 0.98), eps=1e-6, weight_decay=settings.weight_decay, fused=True
    )
    warmup = max(1, round(settings.warmup * settings.steps))
    policy = _windows(model, settings.window)
    mels = MelCache(model.config.num_mel_bins)
    checkpoint = _Checkpoint(work)
    first = checkpoint.load(parameters, optimizer)
    started = time.monotonic()
    samples = 0
    with (work / LOG).open("a") as log, contextlib.ExitStack() as stack:
        if dtype != torch.float32:
            stack.enter_context(torch.autocast(device.type, dtype))
        for step, indices in enumerate(_schedule(train, settings, policy)):
            if step >= settings.steps:
                break
            if step < first:
                continue
            model.train()
            torch.manual_seed(settings.seed * 1_000_003 + step)  # dropout, where a base has any
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
            entry = {
                "step": step + 1,
                "loss": round(value, 5),
                "learning_rate": rate,
                "samples_per_second": round(samples / (time.monotonic() - started), 2),
            }
            log.write(json.dumps(entry) + "\n")
            log.flush()
            report({"done": step + 1, "total": settings.steps, "unit": "steps", **entry})
            if checkpoint.due() and step + 1 < settings.steps:
                checkpoint.save(step + 1, parameters, optimizer)
    seconds = time.monotonic() - started
    result = {
        "steps": settings.steps,
        "learning_rate": peak,
        "samples_per_second": round(samples / max(seconds, 1e-9), 2),
    }
    if validation:
        loss_after = validation_loss(
            model, validation, batch_seconds=settings.batch_seconds, window=settings.window, mels=mels
        )
        result["validation_loss"] = round(loss_after, 5)
    return result
