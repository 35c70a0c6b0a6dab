"""The building blocks of the report's sections."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

import pandas as pd

__all__ = ["LABELS", "Cell", "Section", "between", "details", "download", "table", "wide"]

LABELS = {"wer": "WER", "cer": "CER", "bleu": "BLEU", "chrf": "chrF2", "comet": "COMET"}

MOST_CSV = 1_500_000  # letters of a link: browsers save at most 2 MB from one


class Section(NamedTuple):
    """One part of a run's report."""

    id: str
    heading: str
    html: str


class Cell(NamedTuple):
    """A cell of a table; `text` is escaped, `note` is a smaller line under it."""

    text: str
    note: str = ""
    title: str = ""
    best: bool = False
    kind: str = ""
    """A class: text (long, on the left) or bad."""

    def html(self, tag: str = "td") -> str:
        """The cell as markup."""
        text = f"<strong>{escape(self.text)}</strong>" if self.best else escape(self.text)
        note = f"<small>{escape(self.note)}</small>" if self.note else ""
        title = f' title="{escape(self.title)}"' if self.title else ""
        kind = f' class="{self.kind}"' if self.kind else ""
        scope = ' scope="row"' if tag == "th" else ""
        return f"<{tag}{scope}{title}{kind}>{text}{note}</{tag}>"


def table(
    caption: str,
    head: Sequence[str],
    rows: Iterable[Sequence[Cell | str]],  # the first cell names the row
    groups: Sequence[tuple[str, int]] = (),  # a row over the head: a text and how many columns it is over
) -> str:
    """A table that scrolls in its own box."""
    over = ""
    if groups:
        over = (
            "<tr>"
            + "".join(
                f'<th scope="colgroup" colspan="{span}">{escape(text)}</th>' if text else f'<td colspan="{span}"></td>'
                for text, span in groups
            )
            + "</tr>"
        )
    names = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = []
    for first, *cells in rows:
        name = first if isinstance(first, Cell) else Cell(first)
        written = "".join((cell if isinstance(cell, Cell) else Cell(cell)).html() for cell in cells)
        body.append(f"<tr>{name.html('th')}{written}</tr>")
    return wide(
        f"<table><caption>{escape(caption)}</caption><thead>{over}<tr>{names}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table>"
    )


def between(low: float | None, high: float | None, form: str) -> str:
    """The ends of an interval; nothing where it has none, or is a point."""
    if low is None or high is None or low == high or not math.isfinite(low) or not math.isfinite(high):
        return ""
    return f"{form.format(low)} to {form.format(high)}"


def wide(content: str) -> str:
    """A box that scrolls sideways where its content is wider than the page."""
    return f'<div class="wide">{content}</div>'


def details(summary: str, content: str) -> str:
    """Folded until it is asked for."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def download(name: str, frame: pd.DataFrame) -> str:
    """A link that saves the table as CSV, all digits of it; the file is in the link."""
    data = base64.b64encode(frame.to_csv(index=False).encode()).decode()
    if len(data) > MOST_CSV:
        return f'<p class="csv">{escape(name)}.csv is too large for a page; the output folder has its numbers.</p>'
    return (
        f'<p class="csv"><a download="{escape(name)}.csv" href="data:text/csv;charset=utf-8;base64,{data}">'
        f"{escape(name)}.csv</a></p>"
    )
