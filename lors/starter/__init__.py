"""The embedded base: a tiny multilingual Whisper, shipped with the package, and the recipe that made it."""

from __future__ import annotations

from pathlib import Path

__all__ = ["MODEL_FOLDER"]

MODEL_FOLDER = Path(__file__).parent / "model"
