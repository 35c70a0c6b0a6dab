"""What every section of the experiment file shares. No torch and no Prefect here."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["SPLITS", "Language", "Section", "Task", "nearest"]

Task = Literal["transcribe", "translate"]
Language = Annotated[str, Field(pattern=r"^[a-z]{2,3}$")]
SPLITS = ("train", "validation", "test")


class Section(BaseModel):
    """A frozen part of the file; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


def nearest(name: str, known: Iterable[str]) -> str:
    """`, did you mean 'X'?` with the nearest known name, or nothing."""
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""
