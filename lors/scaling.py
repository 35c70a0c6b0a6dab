"""The search for the scaling coefficients as data: what is tried, in which order, and what is best. No torch here.

The first round tries one coefficient for the whole model. Every later round takes one coordinate, encoder or decoder
or one expert, and multiplies what it has in the best point so far (coordinate descent). The points of a round do not
depend on one another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from lors.config import ScalingSearch

__all__ = ["PARTS", "Round", "choose", "points", "propose", "schedule"]

PARTS: Final = ("encoder", "decoder")
"""The coordinates of a search by part: groups of `lors.groups`. The embeddings are the decoder's."""


@dataclass(frozen=True, slots=True)
class Round:
    """Points that can be scored side by side."""

    coordinate: str | None
    """None: the values are coefficients of the whole model; else factors of this part or expert."""
    values: tuple[float, ...]


def schedule(search: ScalingSearch, experts: Sequence[str]) -> list[Round]:
    """The rounds of a search over `experts` (ids), cut where its budget ends. `search.search` must not be None."""
    assert search.search is not None, "the experiment fills in the method's own"
    coordinates = {"model": (), "part": PARTS, "expert": tuple(experts)}[search.per]
    rounds = [Round(None, search.search)]
    rounds += [Round(name, search.factors) for _ in range(search.rounds) for name in coordinates]
    left, cut = search.budget, []
    for one in rounds:
        kept = one.values if left is None else one.values[:left]
        if kept:
            cut.append(Round(one.coordinate, kept))
        if left is not None:
            left -= len(kept)
    return cut


def points(search: ScalingSearch, experts: Sequence[str]) -> int:
    """How many points the search scores."""
    return sum(len(one.values) for one in schedule(search, experts))


def propose(
    best: Mapping[str, Any],  # {"scaling", "factors"}
    coordinate: str,
    factor: float,
) -> dict[str, Any]:
    """The coefficients of `best` with one coordinate's multiplied by `factor`."""
    factors = dict(best["factors"])
    factors[coordinate] = factors.get(coordinate, 1.0) * factor
    return {"scaling": best["scaling"], "factors": factors}


def choose(tried: Sequence[Mapping[str, Any]], higher_is_better: bool) -> Mapping[str, Any]:
    """The best point by its "value"; of equals the one tried first, so the search moves only where it gains.

    The first round is in rising order, so of equal single coefficients the smaller wins.
    """
    return min(tried, key=lambda point: -point["value"] if higher_is_better else point["value"])
