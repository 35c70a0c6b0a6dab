"""The search for the scaling coefficients as data: what is tried, in which order, and what is best. No torch here.

The first round tries one coefficient for the whole model. Every later round takes one coordinate, encoder or decoder
or one expert, and multiplies what it has in the best point so far (coordinate descent). The points of a round do not
depend on one another. A point is its coefficients, {"scaling": 0.3, "factors": {"encoder": 1.25}}: the coefficient of
the whole model, and what it is multiplied by in a part, or the merge weight of an expert; 1 where there is no factor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from lors.groups import in_group

if TYPE_CHECKING:
    from lors.merging.settings import ScalingSearch

__all__ = ["PARTS", "Round", "choose", "chosen_value", "higher_is_better", "part_of", "points", "propose", "schedule"]

PARTS: Final = ("encoder", "decoder")
"""The coordinates of a search by part."""


@dataclass(frozen=True, slots=True)
class Round:
    """Points that can be scored side by side."""

    coordinate: str | None
    """None: the values are coefficients of the whole model; else factors of this part or expert."""
    values: tuple[float, ...]


def part_of(name: str) -> str:
    """Which of PARTS a parameter belongs to: the embeddings and the output layer are the decoder's."""
    return "encoder" if in_group("encoder", name, ()) else "decoder"


def higher_is_better(metric: str) -> bool:
    """Of a metric of `ScalingSearch`; "score" is an error."""
    return metric in {"bleu", "chrf"}


def schedule(search: ScalingSearch, experts: Sequence[str]) -> list[Round]:
    """The rounds of a search over `experts` (ids), cut where its budget ends. `search.search` must not be None."""
    assert search.search is not None, "the experiment fills in the method's own"
    coordinates = {"model": (), "part": PARTS, "expert": tuple(experts)}[search.per]
    rounds = [Round(None, tuple(dict.fromkeys(search.search)))]
    factors = tuple(dict.fromkeys(search.factors))
    rounds += [Round(name, factors) for _ in range(search.rounds) for name in coordinates]
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
    # Rounded, so that 0.1 times 3 times a third is known to be 0.1 and is not scored again.
    product = round(best["factors"].get(coordinate, 1.0) * factor, 12)
    factors = {**best["factors"], coordinate: product}
    return {"scaling": best["scaling"], "factors": {name: own for name, own in factors.items() if own != 1}}


def choose(tried: Sequence[Mapping[str, Any]], higher_is_better: bool) -> Mapping[str, Any]:
    """The point with the best "value", in whichever order they were tried.

    Of equals the smaller coefficient wins, then the factors nearest to 1: the search moves only where it gains.
    """

    def rank(point: Mapping[str, Any]) -> tuple[Any, ...]:
        value, factors = point["value"], sorted(point["factors"].items())
        deviation = sum(abs(factor - 1) for _, factor in factors)
        return (-value if higher_is_better else value, point["scaling"], deviation, factors)

    return min(tried, key=rank)


def chosen_value(curve: Mapping[str, Any]) -> float | None:
    """The validation value of the point that a search chose (`curve`: scaling.json); None where it was set."""
    for point in curve["points"]:
        if (point["scaling"], point["factors"]) == (curve["scaling"], curve["factors"]):
            return float(point["value"])
    return None
