"""One update of the weights: the gradient of a whole batch, whatever its parts and processes, and the step along it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lors.errors import TrainingError
from lors.speech.architecture import architecture_of
from lors.training.checkpoint import State
from lors.training.distributed import Team
from lors.training.inputs import Batch, Part
from lors.training.loss import divergence, token_loss
from lors.training.precision import require_scale
from lors.training.preserve import Base
from lors.training.weights import update_average

__all__ = [
    "apply",
    "clipped_norm",
    "gradient",
    "memory_errors",
    "not_finite",
    "out_of_memory",
    "part_loss",
    "seed_step",
]


def out_of_memory(what: str) -> TrainingError:
    return TrainingError(
        f"{what} does not fit in the memory of the device: set finetune.gradient_checkpointing, freeze or lora, or "
        "finetune.window to auto, or lower finetune.batch_seconds or corpora.max_seconds, then run again "
        "(docs/training.md says what needs less memory)"
    )


@contextlib.contextmanager
def memory_errors() -> Iterator[None]:
    """Inside, a device without memory is a TrainingError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise out_of_memory("the training") from error


def seed_step(seed: int, step: int, rank: int) -> None:
    """Dropout and layer drop (torch), and the SpecAugment of a base that has its own (numpy)."""
    own = seed * 1_000_003 + step + rank * 1_000_000_007
    torch.manual_seed(own % 2**63)
    np.random.seed(own % 2**32)


def gradient(
    model: Any,
    together: Any,  # what `Team.model` made of it
    batch: Batch,
    state: State,
    smoothing: float,
    dtype: torch.dtype,
    us: Team,
    base: Base | None = None,  # what the model is held to under other prompts
) -> float:
    """The mean loss a token of the whole batch; its gradient is left in the parameters, scaled by `state.scaler`.

    Each part's loss is a sum, divided by the tokens of the whole batch, so that the parts add up to the batch's mean.
    """
    state.optimizer.zero_grad(set_to_none=True)
    device, architecture = model.device, architecture_of(model)
    total = torch.zeros((), device=device)
    with contextlib.ExitStack() as stack:
        for one in (model,) if base is None else (model, base.model):
            stack.enter_context(architecture.windowed(one, batch.window))
        for number, part in enumerate(batch.parts, 1):
            with us.alone(together) if number < len(batch.parts) else contextlib.nullcontext():
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    loss = part.weight * part_loss(together, part, smoothing, device, base)
                # DDP takes the mean over the processes.
                state.scaler.scale(loss * (us.size / batch.tokens)).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
    return us.sum(float(total)) / batch.tokens


def part_loss(model: Any, part: Part, smoothing: float, device: torch.device, base: Base | None = None) -> Tensor:
    """The sum over tokens of a part's losses; with a `base` also of how far the model is from it under other prompts,
    for which the encoder's output is taken again where it is the same speech."""
    inputs = {name: tensor.to(device) for name, tensor in part.inputs.items()}
    out = model(**inputs, use_cache=False)
    loss = token_loss(out.logits, part.labels.to(device), smoothing)
    if base is None or part.others is None:
        return loss
    asked = {"decoder_input_ids": part.others.decoder_input_ids.to(device), "use_cache": False}
    heard: dict[str, Any] = {"encoder_outputs": (out.encoder_last_hidden_state,)}
    if part.others.heard is not None:
        inputs = heard = {name: tensor.to(device) for name, tensor in part.others.heard.items()}
    other = model(**heard, **asked)
    with torch.no_grad():
        given = {"encoder_outputs": (other.encoder_last_hidden_state,)} if base.shares_encoder else inputs
        wanted = base.model(**{**given, **asked}).logits
    return loss + base.weight * divergence(other.logits, wanted, part.others.labels.to(device))


def clipped_norm(state: State, largest: float) -> float:
    """The norm of the gradient, which is then at most `largest`."""
    state.scaler.unscale_(state.optimizer)
    return float(torch.nn.utils.clip_grad_norm_(list(state.parameters.values()), largest))


def not_finite(loss: float, norm: float, scaler: torch.amp.GradScaler) -> str | None:
    if not math.isfinite(loss):
        return f"the loss became {loss}"
    if not math.isfinite(norm) and not scaler.is_enabled():  # which skips the update and scales the next one down
        return f"the gradient became {norm}"
    return None


def apply(state: State, rate: float, ema: float | None) -> None:
    """One step of the optimizer, of the moving average and of `state.progress`."""
    progress = state.progress
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    scale = state.scaler.get_scale()
    state.scaler.step(state.optimizer)
    state.scaler.update()
    progress.step += 1
    if state.scaler.get_scale() < scale:
        progress.skipped += 1
        require_scale(state.scaler, progress.step)
    elif ema is not None:
        update_average(state.averages, state.parameters, ema, progress.step - progress.skipped - 1)
