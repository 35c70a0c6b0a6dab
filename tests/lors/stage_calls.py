"""What calling a stage takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def nothing(event: Any) -> None:
    """Take no notice of progress."""


def folder(path: Path) -> Path:
    """A new folder."""
    path.mkdir(parents=True)
    return path
