"""What stages share: the names of files, models on this child's device, decoding."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["HYPOTHESES", "VECTOR", "Report", "decoding", "device", "load", "use"]

Report = Callable[[Mapping[str, Any]], None]

VECTOR = "task_vector.safetensors"
HYPOTHESES = "hypotheses.parquet"


def use(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)


def load(folder: str, threads: int) -> tuple[Any, Any]:
    """The model in float32 on this child's device, and its processor."""
    from lors.speech.load import load_model

    use(threads)
    return load_model(Path(folder), device=device())


def device() -> str:
    """This process's GPU: with several, each process of a training has its own."""
    import torch

    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


def decoding(settings: Mapping[str, Any]) -> dict[str, Any]:
    own = {name: settings[name] for name in ("tasks", "window", "beams", "batch_seconds")}
    return own | {"fallback": settings.get("fallback", False)}
