"""What a diagnosis of experts says: its tables, as JSON and as Markdown. No torch here."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import pandas as pd

__all__ = ["PARTS", "Diagnosis"]

PARTS = ("encoder", "embeddings", "decoder", "other")


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """Tidy tables. `level` is tensor, layer, part or model, `name` the one of that level; NaN where undefined. The
    functions that are named are those of `lors.diagnostics`.

    experts: one row an expert: energy (|delta|^2), norm, relative_norm (to the base's tensors), energy_share (of the
        expert's whole energy), effective_rank and stable_rank (|D|^2 over the largest squared singular value), and
        effective_rank_ratio, over min(m, n).
    spectra: one row an expert and rank_ratio: retained_energy, the matrices' kept energy over all of it.
    pairs: one row a pair: cosine; sign_conflict, the share of differing signs among the entries where neither delta is
        0 (TIES-Merging, Yadav et al. 2023, sec. 3); weighted_sign_conflict, the same with every entry weighted by the
        product of its two magnitudes; predicted_loss, the mean of `predicted_loss` over both experts, each the mean
        over matrices weighted by the expert's energy.
    subspaces: one row a pair and rank_ratio, of the top-r left (output) and right (input) singular subspaces:
        left_overlap and right_overlap, the mean squared cosine of the principal angles; left_chance and right_chance,
        what random subspaces would have, r/m and r/n; left_angle and right_angle, the median principal angle in
        degrees, left_smallest and right_smallest the smallest; interference, `task_interference` over the norms of the
        truncated deltas (0 orthogonal, 1 identical).
    """

    base: str
    scaling: float
    """The scaling coefficient that predicted_loss is for."""
    rank_ratios: tuple[float, ...]
    experts: pd.DataFrame
    spectra: pd.DataFrame
    pairs: pd.DataFrame
    subspaces: pd.DataFrame

    PAIR_FIGURES: ClassVar = ("cosine", "sign_conflict", "weighted_sign_conflict", "predicted_loss")

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values; null where undefined."""
        tables = {name: getattr(self, name) for name in ("experts", "spectra", "pairs", "subspaces")}
        return {
            "base": self.base,
            "scaling": self.scaling,
            "rank_ratios": list(self.rank_ratios),
            **{name: _records(table) for name, table in tables.items()},
        }

    def table(self) -> str:
        """The figures over the whole model as Markdown: experts, then pairs (the most interference first)."""
        whole = self.experts[self.experts.level == "model"].set_index("expert")
        kept = self.spectra[self.spectra.level == "model"].set_index(["expert", "rank_ratio"]).retained_energy
        parts = self.experts[self.experts.level == "part"].set_index(["expert", "name"]).energy_share
        experts = pd.DataFrame(
            {
                "norm": _written(whole.norm, "{:.3g}"),
                "relative": _written(whole.relative_norm, "{:.2%}"),
                "effective rank": _written(whole.effective_rank, "{:.0f}"),
                "of full rank": _written(whole.effective_rank_ratio, "{:.0%}"),
                **{
                    f"retained at {ratio:.3g}": _written(
                        [kept.get((e, ratio), math.nan) for e in whole.index], "{:.0%}"
                    )
                    for ratio in self.rank_ratios
                },
                **{
                    part: _written([parts[e, part] for e in whole.index], "{:.0%}")
                    for part in PARTS
                    if part in parts.index.get_level_values("name")
                },
            },
            index=whole.index,
        )
        text = _markdown(experts, "expert")
        if self.pairs.empty:
            return text
        at = self.subspaces[self.subspaces.rank_ratio == self.middle_ratio]
        both = self.pairs.merge(at, on=["level", "name", "first", "second"], how="left")
        both = both[both.level == "model"].sort_values("interference", ascending=False, kind="stable")
        pairs = pd.DataFrame(
            {
                "interference": _written(both.interference, "{:.2f}"),
                f"predicted loss at {self.scaling:g}": _written(both.predicted_loss, "{:.0%}"),
                "cosine": _written(both.cosine, "{:.3f}"),
                "sign conflict": _written(both.sign_conflict, "{:.1%}"),
                "weighted": _written(both.weighted_sign_conflict, "{:.1%}"),
                "left overlap": _written(both.left_overlap, "{:.2f}"),
                "left chance": _written(both.left_chance, "{:.2f}"),
                "right overlap": _written(both.right_overlap, "{:.2f}"),
                "right chance": _written(both.right_chance, "{:.2f}"),
            },
            index=both["first"] + " + " + both["second"],
        )
        note = f"Interference and overlaps are of the subspaces at rank ratio {self.middle_ratio:.3g}.\n"
        return f"{text}\n{_markdown(pairs, 'pair')}\n{note}"

    @property
    def middle_ratio(self) -> float:
        """The rank ratio of the figures that are shown at one alone."""
        return self.rank_ratios[len(self.rank_ratios) // 2]


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    def plain(value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return [{str(key): plain(value) for key, value in row.items()} for row in table.to_dict("records")]


def _written(values: Iterable[float], form: str) -> list[str]:
    return [form.format(value) if math.isfinite(value) else "-" for value in values]


def _markdown(table: pd.DataFrame, index: str) -> str:
    cells = [
        [str(key).replace("|", "\\|"), *row] for key, row in zip(table.index, table.to_numpy().tolist(), strict=True)
    ]
    rows = [[index, *table.columns], ["---"] * (len(table.columns) + 1), *cells]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)
