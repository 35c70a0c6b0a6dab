"""Number formats that a device is slow at are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lors.errors import ConfigError, TrainingError
from lors.training.precision import precision_for, require_scale, scaler_for

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_bf16_is_refused_where_a_cpu_emulates_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert precision_for("auto", CPU) is precision_for("fp32", CPU) is torch.float32
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert precision_for("bf16", CPU) is torch.bfloat16
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    with pytest.raises(ConfigError, match=r"this CPU only emulates bf16"):
        precision_for("bf16", CPU)


def test_fp16_is_for_gpus() -> None:
    with pytest.raises(ConfigError, match=r"fp16 needs a GPU"):
        precision_for("fp16", CPU)
    assert precision_for("fp16", CUDA) is torch.float16


def test_auto_is_what_the_gpu_has(monkeypatch: pytest.MonkeyPatch) -> None:
    def has(answer: bool) -> Any:
        return lambda including_emulation=True: including_emulation or answer

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", has(True))
    assert precision_for("auto", CUDA) is precision_for("bf16", CUDA) is torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", has(False))
    assert precision_for("auto", CUDA) is torch.float32
    with pytest.raises(ConfigError, match=r"this GPU only emulates bf16"):
        precision_for("bf16", CUDA)


def test_a_scale_that_fell_too_low() -> None:
    off = scaler_for(torch.float32, CPU)
    assert not off.is_enabled()
    require_scale(off, 3)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    scaler.scale(torch.ones(()))
    require_scale(scaler, 3)
    scaler.update(2.0**-5)
    with pytest.raises(TrainingError, match=r"overflows fp16 at step 3 at any scale"):
        require_scale(scaler, 3)
