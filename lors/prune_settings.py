"""What LoRS keeps of a task vector: the settings alone, without torch; `lors.prune` says what they mean."""

from __future__ import annotations

import re
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from lors.errors import InputError
from lors.groups import in_group, overrides

__all__ = ["COMPOSITIONS", "DTYPES", "Composition", "Dtype", "Prune", "PruneGroup", "PruneSettings", "parse_size"]

Composition = Literal["additive", "sequential", "low_rank", "sparse"]
COMPOSITIONS: tuple[Composition, ...] = get_args(Composition)
Dtype = Literal["float32", "bfloat16", "float16", "int8"]
"""What a compact expert is stored in; int8 holds for the factors, with bfloat16 for the rest."""
DTYPES: tuple[Dtype, ...] = get_args(Dtype)


class PruneGroup(BaseModel):
    """What LoRS keeps of one group of parameters, where that differs."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    rank_ratio: float | None = Field(default=None, gt=0, le=1)
    """Rank over the short side, in (0, 1]; left out, that of the whole model."""
    density: float | None = Field(default=None, gt=0, le=1)
    """Fraction of a tensor's entries that the sparse part keeps, in (0, 1]; left out, that of the whole model."""


class PruneSettings(BaseModel):
    """What LoRS keeps of a task vector."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    composition: Composition = "additive"
    """How the low-rank and the sparse part combine."""
    rank_ratio: float = Field(default=0.1, gt=0, le=1)
    """Rank over the short side, in (0, 1]."""
    density: float = Field(default=0.1, gt=0, le=1)
    """Fraction of a tensor's entries that the sparse part keeps, in (0, 1]."""
    groups: dict[str, PruneGroup] = {}
    """Other rank ratios and densities for the named groups encoder, decoder, embeddings, positions, convolutions, or \
for glob patterns over parameter names; where a parameter is in several, the last one written wins."""
    refinements: int = Field(default=0, ge=0)
    """Alternations L = svd_r(D - S), S = topk(D - L) after the first (GoDec, Zhou and Tao 2011); additive only."""
    vectors: Literal["keep", "drop"] = "keep"
    """Tensors of fewer than two dimensions (biases, layer norms): kept whole, or dropped (delta 0)."""
    include: tuple[str, ...] = ("*",)
    """Named groups, or glob patterns over parameter names: what is in none of them is left out of pruning: its delta \
is kept whole."""
    exclude: tuple[str, ...] = ()
    """Named groups, or glob patterns over parameter names: what is in one is kept whole too, whatever include says."""

    @model_validator(mode="after")
    def _refinements_are_additive(self) -> PruneSettings:
        if self.refinements and self.composition != "additive":
            raise ValueError(f"refinements need the composition additive, not {self.composition}; set refinements to 0")
        return self

    def prunes(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether a parameter takes part; one that does not is kept whole."""
        return any(in_group(group, name, shape) for group in self.include) and not any(
            in_group(group, name, shape) for group in self.exclude
        )

    def of(self, name: str, shape: tuple[int, ...]) -> tuple[float, float]:
        """(rank_ratio, density) of a parameter."""
        own = overrides(
            {group: settings.model_dump(exclude_none=True) for group, settings in self.groups.items()}, name, shape
        )
        return own.get("rank_ratio", self.rank_ratio), own.get("density", self.density)


class Prune(PruneSettings):
    """What LoRS keeps of the task vectors of an experiment."""

    budget: str | None = None
    """The most bytes of each compact expert, such as 20MB: every byte goes where it retains most energy, in place of \
rank_ratio, density and groups (of sequential, the density stays), with factors in int8, or all in bfloat16 where \
there is room."""

    @field_validator("budget")
    @classmethod
    def _is_a_size(cls, budget: str | None) -> str | None:
        if budget is not None:
            try:
                parse_size(budget)
            except InputError as error:
                raise ValueError(str(error)) from error
        return budget

    @property
    def ratios(self) -> PruneSettings:
        """The same without a budget."""
        return PruneSettings(**self.model_dump(exclude={"budget"}))

    @property
    def bytes(self) -> int | None:
        """The budget; None where there is none."""
        return None if self.budget is None else parse_size(self.budget)


UNITS = {"": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def parse_size(text: str) -> int:
    """Bytes of a size such as 20MB (10^6) or 20MiB (2^20). Raises InputError where it is none."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = {known.lower(): known for known in UNITS} | {"b": ""}
    if not match or match[2].lower() not in unit:
        raise InputError(f"the size {text!r} is not a number and a unit; write 20MB (10^6 bytes), or 20MiB (2^20)")
    size = int(float(match[1]) * UNITS[unit[match[2].lower()]])
    if size <= 0:
        raise InputError(f"the size {text!r} is not above 0; write 20MB, for example")
    return size
