"""What LoRS keeps of a task vector: the settings alone, without torch; `lors.prune` says what they mean."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = ["COMPOSITIONS", "Composition", "PruneSettings"]

Composition = Literal["additive", "sequential", "low_rank", "sparse"]
COMPOSITIONS: tuple[Composition, ...] = get_args(Composition)


class PruneSettings(BaseModel):
    """What LoRS keeps of a task vector."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    composition: Composition = "additive"
    """How the low-rank and the sparse part combine."""
    rank_ratio: float = Field(default=0.1, gt=0, le=1)
    """Rank over the short side, in (0, 1]."""
    density: float = Field(default=0.1, gt=0, le=1)
    """Fraction of a tensor's entries that the sparse part keeps, in (0, 1]."""
    refinements: int = Field(default=0, ge=0)
    """Alternations L = svd_r(D - S), S = topk(D - L) after the first (GoDec, Zhou and Tao 2011); additive only."""
    vectors: Literal["keep", "drop"] = "keep"
    """Tensors of fewer than two dimensions (biases, layer norms): kept whole, or dropped (delta 0)."""
    include: tuple[str, ...] = ("*",)
    """Glob patterns over parameter names: what matches none of them is left out of pruning: its delta is kept whole."""
    exclude: tuple[str, ...] = ()
    """Glob patterns over parameter names: what matches one is kept whole too, whatever include says."""

    @model_validator(mode="after")
    def _refinements_are_additive(self) -> PruneSettings:
        if self.refinements and self.composition != "additive":
            raise ValueError(f"refinements need the composition additive, not {self.composition}; set refinements to 0")
        return self

    def prunes(self, name: str) -> bool:
        """Whether the parameter `name` takes part; one that does not is kept whole."""
        return _matches(name, self.include) and not _matches(name, self.exclude)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
