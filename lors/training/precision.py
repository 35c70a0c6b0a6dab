"""The number format of a training: what the device computes fast, and what it only emulates."""

from __future__ import annotations

import torch

from lors.errors import ConfigError, TrainingError

__all__ = ["precision_for", "require_scale", "scaler_for"]

# An update that is still infinite at this scale of the loss is so because of the loss, not of the format.
_LEAST_SCALE = 2.0**-4


def precision_for(setting: str, device: torch.device) -> torch.dtype:
    """The dtype that `finetune.precision` means on a device; ConfigError where that is slower than float32."""
    cuda = device.type == "cuda"
    if setting == "auto":
        return torch.bfloat16 if cuda and torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if setting == "fp16" and not cuda:
        raise ConfigError("finetune.precision: fp16 needs a GPU, a CPU only emulates it: set auto or fp32")
    if setting == "bf16" and not _has_bf16(cuda):  # measured without AVX512-BF16 or AMX: 17 to 34 times slower
        raise ConfigError(
            f"finetune.precision: this {'GPU' if cuda else 'CPU'} only emulates bf16, many times slower than fp32: "
            "set auto or fp32"
        )
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[setting]


def _has_bf16(cuda: bool) -> bool:
    if cuda:
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def scaler_for(dtype: torch.dtype, device: torch.device) -> torch.amp.GradScaler:
    """Scales the loss in fp16, whose small gradients would be 0, and skips updates that overflow; else does nothing."""
    return torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)


def require_scale(scaler: torch.amp.GradScaler, step: int) -> None:
    """TrainingError where update after update overflowed, however small the scale."""
    if scaler.is_enabled() and scaler.get_scale() < _LEAST_SCALE:
        raise TrainingError(
            f"the gradient overflows fp16 at step {step} at any scale: set finetune.precision to fp32 or bf16, or "
            "lower finetune.learning_rate, then run again"
        )
