"""The sections about scores: the headline table, recovery, guard languages, robustness."""

from __future__ import annotations

from html import escape
from typing import Any

import pandas as pd

from lors.drawing import number
from lors.plots import recovery_bars
from lors.report.parts import LABELS, Cell, Section, between, details, download, table, wide
from lors.report.run import Run
from lors.scoring.metrics import LOWER_IS_BETTER, main_metric
from lors.scoring.results import BASE, EXPERTS
from lors.scoring.tables import ahead_of_next, leader

__all__ = ["guard", "headline", "recovery", "robustness"]

_ROBUSTNESS = {
    "insertions": "inserted words",
    "long": "twice as long",
    "compressible": "compressible",
    "repeats": "repeats",
    "empty": "empty",
    "truncated": "token limit",
    "wrong_language": "wrong language",
    "free": "free language",
}
_RIVALS = {"p_base": "base", "p_task_arithmetic": "task_arithmetic"}


def headline(run: Run) -> Section:
    """Systems by languages and tasks."""
    tasks = list(dict.fromkeys(task for _, task in run.pairs()))
    best = run.summary.get("best", {})
    head, groups, columns = ["system"], [("", 1)], []
    for task in tasks:
        pairs = [pair for pair in run.pairs() if pair[1] == task]
        metrics = list(dict.fromkeys(main_metric(task, language) for language, _ in pairs))
        if task == "translate" and any(own.get("comet") is not None for own in run.systems.values()):
            metrics.append("comet")
        head += [f"{language} {LABELS[main_metric(task, language)]}" for language, _ in pairs]
        head += [f"mean {LABELS[metric]}" for metric in metrics]
        columns.append((pairs, metrics))
        better = "lower" if metrics[0] in LOWER_IS_BETTER else "higher"
        groups.append((f"{task}, {better} is better", len(pairs) + len(metrics)))
    extra = {"recovery": "recovery", "ratio_to_expert": "ratio to expert", "relative_to_base": "relative to base"}
    shown = {key: name for key, name in extra.items() if any(own.get(key) is not None for own in run.systems.values())}
    worst = "recovery" in shown and any(own.get("worst") for own in run.systems.values())
    first, after = leader(run.summary), list(shown.values())
    head += [*after[:1], *(["worst recovery"] if worst else []), *after[1:]]
    if len(head) > 1 + sum(span for _, span in groups[1:]):
        groups.append(("both tasks, higher is better", len(head) - sum(span for _, span in groups)))
    rows = []
    for name, own in run.systems.items():
        row: list[Cell | str] = [name]
        for pairs, metrics in columns:
            row += [_score(run, name, *pair, best=best.get(" ".join(pair)) == name) for pair in pairs]
            row += [number(own.get(metric), "{:.1f}") for metric in metrics]
        for key in shown:
            ends = (own.get(f"{key}_low"), own.get(f"{key}_high"))
            best_of_all = key == "recovery" and name == first
            row.append(Cell(number(own.get(key), "{:.2f}"), between(*ends, "{:.2f}"), best=best_of_all))
            if key == "recovery" and worst:
                found = (name not in (BASE, EXPERTS) and own.get("worst")) or {}
                row.append(Cell(number(found.get("recovery"), "{:.2f}"), found.get("of", "")))
        rows.append(row)
    notes = [f"Split {run.split}. Rates in percent, under each its 95 % bootstrap interval."]
    notes.append(
        "Bold: better than every other system beyond its paired interval; experts and switched, a model a language "
        "and task, are no rivals. Point at a score for its p-values."
        if best
        else "This run did not record which differences its intervals support, so nothing is in bold."
    )
    if left_out := run.summary.get("recovery_left_out"):
        notes.append(f"Recovery leaves out, as the expert is not better than the base there: {', '.join(left_out)}.")
    text = f"<p>{escape(' '.join(notes))}</p>" + table("Scores by system", head, rows, groups)
    return Section("scores", "Scores", text + _all_scores(run) + download("results", run.results))


def _score(run: Run, system: str, language: str, task: str, *, best: bool = False) -> Cell:
    rows = run.main
    found = rows[rows["system"].eq(system) & rows["language"].eq(language) & rows["task"].eq(task)]
    if found.empty:
        return Cell("-")
    row = found.iloc[0]
    told = [f"{_p(row[key])} against {rival}" for key, rival in _RIVALS.items() if key in row and pd.notna(row[key])]
    note = between(row["low"], row["high"], "{:.1f}")
    return Cell(number(row["value"], "{:.1f}"), note, ", ".join(told), best)


def _p(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def _all_scores(run: Run) -> str:
    """Every score with its interval and p-values, folded."""
    rows = run.results[run.results["metric"].isin(LABELS)]
    tested = [key for key in _RIVALS if key in rows]
    texts = [name for name in ("language", "task", "split", "metric", "normaliser") if name in rows]
    head = ["system", *texts, "value", "95 % interval", *(f"p against {_RIVALS[key]}" for key in tested), "signature"]
    written = [
        [
            str(row["system"]),
            *(str(row[name]) for name in texts),
            number(row["value"], "{:.2f}"),
            between(row["low"], row["high"], "{:.2f}"),
            *(_p(row[key]).removeprefix("p ").removeprefix("= ") if pd.notna(row[key]) else "-" for key in tested),
            str(row["signature"]),
        ]
        for row in rows.to_dict("records")
    ]
    return details(f"All {len(written)} scores, with their signatures", table("Every score", head, written))


def recovery(run: Run) -> Section | None:
    """Bars, and where recovery comes from."""
    names = [name for name, own in run.systems.items() if own.get("recovery") is not None]
    if not set(names) - {BASE, EXPERTS}:
        return None
    text = (
        "<p>Recovery is (base - system) / (base - expert) by the main metric: 0 is the base, 1 the experts, which hold "
        "a model a language and task. Whiskers are 95 % bootstrap intervals. "
        f"{escape(ahead_of_next(run.summary) or '')}</p>"
    )
    ahead = run.summary.get("ahead")
    of = run.summary.get("recovery_of", {})
    columns = list(dict.fromkeys(pair for own in of.values() for pair in own))
    tasks = list(dict.fromkeys(task for name in names for task in run.systems[name].get("recovery_by_task", {})))
    head = ["system", "mean", *([f"less than {ahead['system']}"] if ahead else []), *tasks, *columns]
    rows: list[list[Cell | str]] = []
    records = []
    for name in names:
        own = run.systems[name]
        by_task = own.get("recovery_by_task", {})
        ends = (own.get("recovery_low"), own.get("recovery_high"))
        row: list[Cell | str] = [name, Cell(number(own["recovery"], "{:.2f}"), between(*ends, "{:.2f}"))]
        if ahead:
            by = ahead["by"].get(name, {})
            row.append(Cell(number(by.get("value"), "{:.2f}"), between(by.get("low"), by.get("high"), "{:.2f}")))
        row += [number(by_task.get(task), "{:.2f}") for task in tasks]
        records.append({"system": name, "of": "mean", "recovery": own["recovery"], "low": ends[0], "high": ends[1]})
        records += [{"system": name, "of": task, "recovery": by_task.get(task)} for task in tasks]
        for pair in columns:
            found = of.get(name, {}).get(pair) or {}
            ends = (found.get("low"), found.get("high"))
            row.append(Cell(number(found.get("value"), "{:.2f}"), between(*ends, "{:.2f}")))
            records.append(
                {"system": name, "of": pair, "recovery": found.get("value"), "low": ends[0], "high": ends[1]}
            )
        rows.append(row)
    drawing = wide(recovery_bars(run.summary))
    numbers = details("Values, by language and task", table("Recovery", head, rows))
    return Section("recovery", "Recovery", text + drawing + numbers + download("recovery", pd.DataFrame(records)))


def guard(run: Run) -> Section | None:
    """Languages that no expert was trained for."""
    found = run.summary.get("guard")
    pairs = run.pairs(guard=True)
    if not found or not pairs:
        return None
    rows = []
    for name, own in found["systems"].items():
        cells = []
        for pair in pairs:
            cell = _score(run, name, *pair)
            worse = " ".join(pair) in own.get("forgotten", ())
            cells.append(cell._replace(text=f"{cell.text} worse", kind="bad") if worse else cell)
        rows.append([name, *cells])
    head = ["system", *(f"{language} {LABELS[main_metric(task, language)]}" for language, task in pairs)]
    text = (
        "<p>No expert was trained for these languages, so a system should be as good as the base there. "
        "Marked as worse: beyond the paired 95 % interval.</p>"
    )
    numbers = run.scores[run.scores["language"].isin(run.guard)]
    return Section("guard", "Guard languages", text + table("Scores", head, rows) + download("guard", numbers))


def robustness(run: Run) -> Section | None:
    """What error rates hide."""
    found: dict[str, dict[str, Any]] = run.summary.get("robustness") or {}
    keys = [key for key in _ROBUSTNESS if any(own.get(key) is not None for own in found.values())]
    if not keys:
        return None
    rows = [[name, *(number(own.get(key), "{:.1f}") for key in keys)] for name, own in found.items()]
    text = (
        "<p>Means over the trained languages, lower is better. Inserted words are percent of the reference's words; "
        "the others percent of utterances: a hypothesis over twice as long as its reference, compressible (zlib ratio "
        "above 2.4) or with repeated n-grams, as loops are, empty, cut at the token limit, or heard as another "
        "language. Free language is the error rate where the model itself says which language it hears.</p>"
    )
    names = [_ROBUSTNESS[key] for key in keys]
    frame = pd.DataFrame([{"system": name, **{key: own.get(key) for key in keys}} for name, own in found.items()])
    shown = table("Robustness, percent", ["system", *names], rows)
    return Section("robustness", "Robustness", text + shown + download("robustness", frame))
