"""The diagnosis as one HTML file: inline SVG, no script, no network, light and dark."""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING

import pandas as pd

from lors.drawing import (
    LABEL,
    STYLE,
    document,
    figure,
    heat_map,
    hues,
    keys,
    label,
    line_plot,
    number_table,
    svg,
)

if TYPE_CHECKING:
    from lors.diagnosis import Diagnosis

__all__ = ["STYLE", "page", "sections"]

MOST_PAIRS = 45  # rows of a heat map of pairs: all pairs of ten experts


def page(diagnosis: Diagnosis, title: str) -> str:
    """One self-contained HTML document; identifiers and the title are escaped."""
    return document(title, "\n".join(sections(diagnosis)))


def sections(diagnosis: Diagnosis, level: int = 2) -> list[str]:
    """The parts of the page, for another page to hold: an introduction, then figures under headings of that level."""
    introduction = (
        f"<p>Experts against their base <strong>{escape(diagnosis.base)}</strong>. Figures over several tensors are "
        "exact for norms, cosine and sign conflicts, and weighted by energy for the rest. Point at a cell for its "
        "value; every figure has its values as a table under it.</p>"
    )
    pairs = _pairs(diagnosis, level) if len(diagnosis.pairs) else []
    return [introduction, *_experts(diagnosis, level), *pairs]


def _experts(diagnosis: Diagnosis, level: int) -> list[str]:
    experts = diagnosis.experts
    whole = experts[experts.level == "model"].set_index("expert")
    layers = experts[experts.level == "layer"]
    norms, ranks = (_grid(layers, ["expert"], name) for name in ("relative_norm", "effective_rank_ratio"))
    parts = _grid(experts[experts.level == "part"], ["expert"], "energy_share")
    spectra = diagnosis.spectra[diagnosis.spectra.level == "model"]
    kept = spectra.pivot(index="expert", columns="rank_ratio", values="retained_energy")
    summary = pd.DataFrame(
        {
            "norm": whole.norm,
            "relative norm": whole.relative_norm,
            "effective rank": whole.effective_rank,
            "of full rank": whole.effective_rank_ratio,
            "stable rank": whole.stable_rank,
        }
    )
    return [
        f"<h{level}>Experts</h{level}><p>Relative norm is the delta's over the base's: how far training moved. "
        "Effective rank is "
        "exp of the entropy of the singular values (Roy and Vetterli 2007): how many directions it moved in.</p>"
        + number_table(summary, "Over the whole model", "{:.3g}"),
        figure(
            "Where each expert moved",
            "Relative norm by layer. A layer much darker than its neighbours is where experts are most likely to meet.",
            heat_map(norms, None, "{:.2%}", "Relative norm by expert and layer"),
            norms,
            "{:.4f}",
            level,
        ),
        figure(
            "In how many directions",
            "Effective rank over full rank by layer. Pale layers lose little when they are pruned to a low rank; "
            "empty cells have vectors alone.",
            heat_map(ranks, None, "{:.1%}", "Effective rank by expert and layer"),
            ranks,
            "{:.3f}",
            level,
        ),
        figure(
            "What pruning to a rank keeps",
            "Retained energy against rank ratio. The steeper a curve rises, the less a low-rank component leaves out.",
            _curves(kept),
            kept,
            "{:.3f}",
            level,
        ),
        figure(
            "Which part holds the energy",
            "Shares of each delta's energy. Where the embeddings hold much of it, leaving them out of a merge, or a "
            "scaling coefficient of their own, makes a difference.",
            _bars(parts),
            parts,
            "{:.3f}",
            level,
        ),
    ]


def _pairs(diagnosis: Diagnosis, level: int) -> list[str]:
    ratio, keys = diagnosis.middle_ratio, ["first", "second"]
    spaces = diagnosis.subspaces[diagnosis.subspaces.rank_ratio == ratio].drop(columns="rank_ratio")
    both = diagnosis.pairs.merge(spaces, on=["level", "name", *keys], how="left")
    whole = both[both.level == "model"].sort_values(["interference", *keys], ascending=[False, True, True])
    shown = whole.head(MOST_PAIRS)[keys]
    layers = shown.merge(both[both.level == "layer"], on=keys)
    summary = whole.set_index(whole["first"] + " + " + whole["second"])[
        ["interference", *diagnosis.PAIR_FIGURES, "left_overlap", "left_chance", "right_overlap", "right_chance"]
    ].rename(columns=lambda name: f"predicted loss at {diagnosis.scaling:g}" if name == "predicted_loss" else name)
    cut = f" The maps show the {len(shown)} of {len(whole)} pairs with the most." if len(shown) < len(whole) else ""
    maps = [
        (
            "cosine",
            "Cosine",
            "Warm: both moved the same way, so that a plain sum moves too far. Cool: they undo each other.",
            0.0,
            "{:.3f}",
        ),
        (
            "sign_conflict",
            "Sign conflict",
            "Share of the entries whose signs differ (TIES-Merging, sec. 3). Unrelated experts have one half, the "
            "palest colour; warm is more conflict than that, cool less.",
            0.5,
            "{:.1%}",
        ),
        (
            "left_overlap",
            f"Overlap of the output subspaces at rank ratio {ratio:.3g}",
            "Mean squared cosine of the principal angles between the left singular subspaces: 0 orthogonal, 1 the "
            "same. Unrelated subspaces have r/m, the chance in the table.",
            None,
            "{:.2f}",
        ),
        (
            "right_overlap",
            f"Overlap of the input subspaces at rank ratio {ratio:.3g}",
            "The same for the right singular subspaces: whether both experts read the same features of a layer.",
            None,
            "{:.2f}",
        ),
        (
            "interference",
            f"Interference at rank ratio {ratio:.3g}",
            "The share of each delta's norm that lies in the other's output and input subspaces at once.",
            None,
            "{:.2f}",
        ),
    ]
    sections = [
        f"<h{level}>Pairs</h{level}><p>Sorted by interference, the share of each delta that lies in the other's top "
        "singular "
        "subspaces (0 none, 1 identical deltas): what a plain sum counts twice. Predicted loss is the share of its own "
        f"gain that an expert would lose in a merge of two at scaling coefficient {diagnosis.scaling:g}, by a rough "
        "model without data. Read both as hints: on the six experts they were chosen on, interference ranked the "
        f"measured damage at scaling coefficient 1 and not below, predicted loss weakly at each.{cut}</p>"
        + number_table(summary, "Over the whole model", "{:.3f}")
    ]
    for name, heading, text, centre, form in maps:
        grid = _grid(layers, keys, name)
        sections.append(
            figure(heading, text, heat_map(grid, centre, form, f"{heading} by pair and layer"), grid, "{:.3f}", level)
        )
    return sections


def _grid(rows: pd.DataFrame, keys: list[str], value: str) -> pd.DataFrame:
    """Experts or pairs down, layers or parts across, both in the order of `rows`."""
    labels = pd.Series([" + ".join(row) for row in rows[keys].to_numpy().tolist()], index=rows.index)
    wide = rows.assign(label=labels).pivot(index="label", columns="name", values=value)
    return wide.loc[labels.unique(), rows.name.unique()]


def _curves(kept: pd.DataFrame) -> str:
    ratios = [float(ratio) for ratio in kept.columns]
    curves = {
        str(expert): [(0.0, 0.0), *zip(ratios, row, strict=True)]
        for expert, row in zip(kept.index, kept.to_numpy(float).tolist(), strict=True)
    }
    return line_plot(
        curves,
        "rank ratio",
        "retained energy",
        about="Retained energy against rank ratio by expert",
        form="{:.0%}",
        bounds=(0.0, 1.0),
        size=(640, 336 + 16 * len(kept) // 2),
    )


def _bars(shares: pd.DataFrame) -> str:
    width, colours = 480, hues(len(shares.columns))
    parts = []
    for y, (expert, row) in enumerate(zip(shares.index, shares.to_numpy(float).tolist(), strict=True)):
        x, top = float(LABEL), 4 + 22 * y
        parts.append(label(str(expert), LABEL - 8, top + 13))
        for hue, part, share in zip(colours, shares.columns, row, strict=True):
            if not math.isfinite(share):
                continue
            text = f"{escape(f'{expert}, {part}')}: {share:.1%}"
            parts.append(
                f'<rect class="key" style="--h:{hue}" x="{x:.1f}" y="{top}" width="{width * share:.1f}" height="17">'
                f"<title>{text}</title></rect>"
            )
            x += width * share
    bottom = 4 + 22 * len(shares)
    parts += keys([str(part) for part in shares.columns], colours, LABEL, bottom + 6)
    return svg(
        LABEL + width + 20,
        bottom + 16 * len(shares.columns) + 14,
        "".join(parts),
        "Shares of energy by part and expert",
    )
