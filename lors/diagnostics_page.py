"""The diagnosis as one HTML file: inline SVG, no script, no network, light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, NamedTuple

import pandas as pd

if TYPE_CHECKING:
    from lors.diagnostics import Diagnosis

__all__ = ["page"]

CELL, LABEL, HEAD = 18, 250, 96  # pixels: a cell's side, the room for row labels and for column labels
MOST_PAIRS = 45  # rows of a heat map of pairs: all pairs of ten experts
LABEL_LETTERS = 34

STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--paper:#fff;--soft:#57606a;--line:#d0d7de;--low:#f3f4f6;--high:#7a1fa2;
--warm:#b3261e;--cool:#0b57a4;--shade:38%}
@media(prefers-color-scheme:dark){:root{--ink:#e6edf3;--paper:#0d1117;--soft:#9da7b3;--line:#3d444d;--low:#21262d;
--high:#d7a6ff;--warm:#ff8a80;--cool:#79b8ff;--shade:68%}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:1080px;margin:2rem auto;
padding:0 1rem}
h1{font-size:1.6rem}h2{font-size:1.15rem;margin:2.2rem 0 .3rem}p{max-width:75ch;margin:.4rem 0}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums}
th,td{border-bottom:1px solid var(--line);padding:.2rem .6rem;text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left}caption{text-align:left;color:var(--soft);padding-bottom:.3rem}
svg{display:block;margin:.6rem 0;font:12px system-ui,sans-serif}svg text{fill:var(--ink)}svg .soft{fill:var(--soft)}
.up{fill:color-mix(in oklab,var(--high) var(--p),var(--low))}
.above{fill:color-mix(in oklab,var(--warm) var(--p),var(--low))}
.below{fill:color-mix(in oklab,var(--cool) var(--p),var(--low))}.none{fill:none;stroke:var(--line)}
.axis{stroke:var(--line);fill:none}.curve{fill:none;stroke-width:2;stroke:hsl(var(--h) 60% var(--shade))}
.key{fill:hsl(var(--h) 60% var(--shade))}summary{cursor:pointer;color:var(--soft);font-size:13px}
"""


class _Scale(NamedTuple):
    """Where the colours of a heat map lie: from `low` to `high`, or to both sides of `centre`."""

    low: float
    high: float
    centre: float | None

    @classmethod
    def of(cls, table: pd.DataFrame, centre: float | None) -> _Scale:
        values = [value for value in table.to_numpy(float).ravel() if math.isfinite(value)]
        if centre is None:
            return cls(0.0, max([*values, 1e-12]), None)
        reach = max([abs(value - centre) for value in values] + [1e-12])
        return cls(centre - reach, centre + reach, centre)

    def cell(self, value: float) -> str:
        """The class and the style of a cell."""
        if not math.isfinite(value):
            return 'class="none"'
        if self.centre is None:
            return f'class="up" style="--p:{max(value, 0) / self.high:.1%}"'
        share = abs(value - self.centre) / (self.high - self.centre)
        return f'class="{"above" if value >= self.centre else "below"}" style="--p:{share:.1%}"'


def page(diagnosis: Diagnosis, title: str) -> str:
    """One self-contained HTML document; identifiers and the title are escaped."""
    sections = [*_experts(diagnosis), *(_pairs(diagnosis) if len(diagnosis.pairs) else [])]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><main><h1>{escape(title)}</h1>\n"
        f"<p>Experts against their base <strong>{escape(diagnosis.base)}</strong>. Figures over several tensors are "
        "exact for norms, cosine and sign conflicts, and weighted by energy for the rest. Point at a cell for its "
        "value; every figure has its values as a table under it.</p>\n"
        + "\n".join(sections)
        + "\n</main></body></html>\n"
    )


def _experts(diagnosis: Diagnosis) -> list[str]:
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
        "<h2>Experts</h2><p>Relative norm is the delta's over the base's: how far training moved. Effective rank is "
        "exp of the entropy of the singular values (Roy and Vetterli 2007): how many directions it moved in.</p>"
        + _table(summary, "Over the whole model", "{:.3g}"),
        _figure(
            "Where each expert moved",
            "Relative norm by layer. A layer much darker than its neighbours is where experts are most likely to meet.",
            _heat_map(norms, None, "{:.2%}"),
            norms,
            "{:.4f}",
        ),
        _figure(
            "In how many directions",
            "Effective rank over full rank by layer. Pale layers lose little when they are pruned to a low rank; "
            "empty cells have vectors alone.",
            _heat_map(ranks, None, "{:.1%}"),
            ranks,
            "{:.3f}",
        ),
        _figure(
            "What pruning to a rank keeps",
            "Retained energy against rank ratio. The steeper a curve rises, the less a low-rank component leaves out.",
            _curves(kept),
            kept,
            "{:.3f}",
        ),
        _figure(
            "Which part holds the energy",
            "Shares of each delta's energy. Where the embeddings hold much of it, leaving them out of a merge, or a "
            "scaling coefficient of their own, makes a difference.",
            _bars(parts),
            parts,
            "{:.3f}",
        ),
    ]


def _pairs(diagnosis: Diagnosis) -> list[str]:
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
        "<h2>Pairs</h2><p>Sorted by interference, the share of each delta that lies in the other's top singular "
        "subspaces (0 none, 1 identical deltas): what a plain sum counts twice. Predicted loss is the share of its own "
        f"gain that an expert would lose in a merge of two at scaling coefficient {diagnosis.scaling:g}, by a rough "
        "model without data. Read both as hints: on the six experts they were chosen on, interference ranked the "
        f"measured damage at scaling coefficient 1 and not below, predicted loss weakly at each.{cut}</p>"
        + _table(summary, "Over the whole model", "{:.3f}")
    ]
    for name, heading, text, centre, form in maps:
        grid = _grid(layers, keys, name)
        sections.append(_figure(heading, text, _heat_map(grid, centre, form), grid, "{:.3f}"))
    return sections


def _grid(rows: pd.DataFrame, keys: list[str], value: str) -> pd.DataFrame:
    """Experts or pairs down, layers or parts across, both in the order of `rows`."""
    labels = pd.Series([" + ".join(row) for row in rows[keys].to_numpy().tolist()], index=rows.index)
    wide = rows.assign(label=labels).pivot(index="label", columns="name", values=value)
    return wide.loc[labels.unique(), rows.name.unique()]


def _figure(heading: str, text: str, drawing: str, table: pd.DataFrame, form: str) -> str:
    values = f"<details><summary>Values</summary>{_table(table, heading, form)}</details>"
    return (
        f'<section><h2>{escape(heading)}</h2><p>{escape(text)}</p><div class="wide">{drawing}</div>{values}</section>'
    )


def _table(table: pd.DataFrame, caption: str, form: str) -> str:
    head = "".join(f'<th scope="col">{escape(str(name)).replace("_", " ")}</th>' for name in table.columns)
    body = "".join(
        f'<tr><th scope="row">{escape(str(label))}</th>'
        + "".join(f"<td>{_number(value, form)}</td>" for value in row)
        + "</tr>"
        for label, row in zip(table.index, table.to_numpy(float).tolist(), strict=True)
    )
    return (
        f'<div class="wide"><table><caption>{escape(caption)}</caption>'
        f"<thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _number(value: float, form: str) -> str:
    return form.format(value) if math.isfinite(value) else "-"


def _heat_map(table: pd.DataFrame, centre: float | None, form: str) -> str:
    scale = _Scale.of(table, centre)
    width, height = LABEL + CELL * len(table.columns) + 60, HEAD + CELL * len(table) + 44
    parts = [
        f'<text transform="translate({LABEL + CELL * (x + 0.7):.0f} {HEAD - 6}) rotate(-60)">'
        f"{escape(_short(str(name)))}</text>"
        for x, name in enumerate(table.columns)
    ]
    for y, (label, row) in enumerate(zip(table.index, table.to_numpy(float).tolist(), strict=True)):
        top = HEAD + CELL * y
        parts.append(_label(str(label), LABEL - 8, top + 13))
        parts += [
            f'<rect x="{LABEL + CELL * x}" y="{top}" width="{CELL - 1}" height="{CELL - 1}" {scale.cell(value)}>'
            f"<title>{escape(f'{label}, {name}')}: {_number(value, form)}</title></rect>"
            for x, (name, value) in enumerate(zip(table.columns, row, strict=True))
        ]
    return _svg(width, height, "".join(parts) + _legend(scale, form, LABEL, height - 30))


def _legend(scale: _Scale, form: str, x: int, y: int) -> str:
    steps = 9
    values = [scale.low + (scale.high - scale.low) * step / (steps - 1) for step in range(steps)]
    cells = "".join(
        f'<rect x="{x + 14 * step}" y="{y}" width="14" height="10" {scale.cell(value)}/>'
        for step, value in enumerate(values)
    )
    marks = [(0, values[0]), (steps - 1, values[-1])] + (
        [(steps // 2, scale.centre)] if scale.centre is not None else []
    )
    return cells + "".join(
        f'<text class="soft" x="{x + 14 * step + 7}" y="{y + 24}" text-anchor="middle">{form.format(value)}</text>'
        for step, value in marks
    )


def _curves(kept: pd.DataFrame) -> str:
    left, top, width, height = 48, 12, 420, 240
    hues, ratios = _hues(len(kept)), [float(ratio) for ratio in kept.columns]

    def at(ratio: float, share: float) -> str:
        return f"{left + width * ratio:.1f},{top + height * (1 - share):.1f}"

    parts = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y, x = top + height * (1 - share), left + width * share
        parts.append(f'<path class="axis" d="M{left} {y:.0f}h{width}"/>')
        parts.append(f'<text class="soft" x="{left - 6}" y="{y + 4:.0f}" text-anchor="end">{share:.0%}</text>')
        parts.append(f'<text class="soft" x="{x:.0f}" y="{top + height + 18}" text-anchor="middle">{share:.0%}</text>')
    parts.append(
        f'<text class="soft" x="{left + width / 2:.0f}" y="{top + height + 36}" text-anchor="middle">rank ratio</text>'
    )
    for hue, expert, row in zip(hues, kept.index, kept.to_numpy(float).tolist(), strict=True):
        points = " ".join(
            [at(0, 0), *(at(ratio, share) for ratio, share in zip(ratios, row, strict=True) if math.isfinite(share))]
        )
        title = f"<title>{escape(str(expert))}</title>"
        parts.append(f'<polyline class="curve" style="--h:{hue}" points="{points}">{title}</polyline>')
    parts += _keys([str(expert) for expert in kept.index], hues, left + width + 24, top)
    return _svg(left + width + 24 + LABEL + 40, max(top + height + 44, top + 16 * len(kept) + 8), "".join(parts))


def _bars(shares: pd.DataFrame) -> str:
    width, hues = 480, _hues(len(shares.columns))
    parts = []
    for y, (label, row) in enumerate(zip(shares.index, shares.to_numpy(float).tolist(), strict=True)):
        x, top = float(LABEL), 4 + 22 * y
        parts.append(_label(str(label), LABEL - 8, top + 13))
        for hue, part, share in zip(hues, shares.columns, row, strict=True):
            if not math.isfinite(share):
                continue
            text = f"{escape(f'{label}, {part}')}: {share:.1%}"
            parts.append(
                f'<rect class="key" style="--h:{hue}" x="{x:.1f}" y="{top}" width="{width * share:.1f}" height="17">'
                f"<title>{text}</title></rect>"
            )
            x += width * share
    bottom = 4 + 22 * len(shares)
    parts += _keys([str(part) for part in shares.columns], hues, LABEL, bottom + 6)
    return _svg(LABEL + width + 20, bottom + 16 * len(shares.columns) + 14, "".join(parts))


def _keys(names: Sequence[str], hues: Sequence[int], x: int, y: int) -> list[str]:
    return [
        f'<rect class="key" style="--h:{hue}" x="{x}" y="{y + 16 * row}" width="10" height="10"/>'
        f'<text x="{x + 16}" y="{y + 16 * row + 10}">{escape(_cut(name))}</text>'
        for row, (hue, name) in enumerate(zip(hues, names, strict=True))
    ]


def _hues(count: int) -> list[int]:
    return [210 + round(360 * index / max(1, count)) for index in range(count)]


def _label(text: str, x: int, y: int) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="end">{escape(_cut(text))}<title>{escape(text)}</title></text>'


def _cut(text: str) -> str:
    return text if len(text) <= LABEL_LETTERS else f"{text[: LABEL_LETTERS // 2 - 1]}…{text[-LABEL_LETTERS // 2 :]}"


def _short(layer: str) -> str:
    """`enc 3`, `dec tokens`: a layer's name that fits over a column."""
    for long, short in (("encoder.", "enc "), ("decoder.", "dec "), ("layers.", ""), ("embed_", ""), ("layer_", "")):
        layer = layer.replace(long, short)
    return layer if len(layer) <= 16 else f"{layer[:15]}…"


def _svg(width: float, height: float, content: str) -> str:
    size = f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
    return f'<svg role="img" {size}>{content}</svg>'
