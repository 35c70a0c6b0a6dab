"""Output folders as a run leaves them: real scores of made-up hypotheses, and by hand what a run adds to them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pandas as pd

from lors.scoring.files import write_results
from lors.scoring.results import score_tables
from lors.scoring.summary import summarise

WORDS = "uno dos tres cuatro cinco seis siete ocho nueve diez once doce".split()
ERRORS = {"base": 0.5, "experts": 0.1, "switched": 0.15, "lors": 0.3, "task_arithmetic": 0.4}
HOSTILE = '<script>document.title="x"</script>&amp;"\'<b>'


def hypotheses(system: str, languages: tuple[str, ...], utterances: int, seed: int = 0) -> pd.DataFrame:
    """A table of a system that gets each word wrong with its probability."""
    sentences, mistakes = random.Random(seed), random.Random(f"{system} {seed}")
    rows = []
    for language in languages:
        for task in ("transcribe", "translate"):
            for number in range(utterances):
                reference = sentences.choices(WORDS, k=8)
                said = [word if mistakes.random() > ERRORS[system] else mistakes.choice(WORDS) for word in reference]
                rows.append(
                    {
                        "id": f"{language}-{number:05}",
                        "language": language,
                        "task": task,
                        "split": "test",
                        "speaker": f"s{number % 10}",
                        "seconds": 2.0,
                        "reference": " ".join(reference),
                        "hypothesis": " ".join(said),
                        "window": 7.0,
                        "tokens": 12,
                        "truncated": False,
                    }
                )
    return pd.DataFrame(rows)


def write_run(
    folder: Path,
    *,
    languages: tuple[str, ...] = ("es", "fr"),
    guard: tuple[str, ...] = ("it",),
    utterances: int = 20,
    rank_ratio: float = 0.1,
    seed: int = 0,
) -> Path:
    """A whole output folder."""
    (folder / "hypotheses").mkdir(parents=True)
    tables = {
        system: hypotheses(
            system, languages + (guard if system not in ("experts", "switched") else ()), utterances, seed
        )
        for system in ERRORS
    }
    tables["lors"].loc[0, "hypothesis"] = HOSTILE
    for system, table in tables.items():
        table.to_parquet(folder / "hypotheses" / f"{system}.parquet", index=False)
    results = score_tables(tables, resamples=100)
    write_results(results, folder)
    experts = [f"{language}-{task}" for language in languages for task in ("transcribe", "translate")]
    summary: dict[str, Any] = {
        **summarise(results, tables, guard=guard, resamples=100),
        "model": "lors, in model/",
        "scaling": 0.3,
        "sizes": {"model": 5_000_000, "experts": {expert: 600_000 + 9000 * i for i, expert in enumerate(experts)}},
        "seconds": 93.5,
        "curves": {"lors": curve(experts), "task_arithmetic": {**curve(experts), "factors": {}}},
        "corpora": {
            language: {
                split: {"utterances": 20, "seconds": 36.0, "speakers": 10, "rejected": {"too long": 1}}
                for split in ("train", "test")
            }
            for language in languages
        },
        "steps": [
            {"name": "prepare es train", "stage": "prepare_split", "key": "1" * 32, "state": "cached", "seconds": 20.0},
            {"name": "fine-tune es", "stage": "fine_tune", "key": "2" * 32, "state": "run", "seconds": 300.0},
        ],
        "seeds": {"finetune": 0, "corpora": None},
        "digests": {"prepare es train": "3" * 64, "fine-tune es": "4" * 64},
        "versions": {"lors": "0.1.0"},
        "machine": "x86_64, 2 cores",
        "experiment": {
            "base": "starter",
            "languages": list(languages),
            "tasks": ["transcribe", "translate"],
            "prune": {"rank_ratio": rank_ratio},
            "merge": {"method": "lors"},
            "output": str(folder),
        },
    }
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    (folder / "training.csv").write_text(training(experts, 100), encoding="utf-8")
    (folder / "diagnosis.json").write_text(json.dumps(diagnosis(experts)), encoding="utf-8")
    return folder


def curve(experts: list[str]) -> dict[str, Any]:
    """A search by part."""
    tried: list[tuple[float, dict[str, float], str | None, float]] = [
        (0.1, {}, None, 40.0),
        (0.3, {}, None, 35.0),
        (0.5, {}, None, 38.0),
        (0.3, {"encoder": 1.25}, "encoder", 34.0),
    ]
    points = [
        {"scaling": s, "factors": f, "coordinate": c, "value": v, "values": dict.fromkeys(experts, v)}
        for s, f, c, v in tried
    ]
    return {
        "scaling": 0.3,
        "factors": {"encoder": 1.25},
        "metric": "score",
        "higher_is_better": False,
        "points": points,
    }


def training(experts: list[str], steps: int) -> str:
    """A log with validation at every tenth step."""
    lines = ["model,step,loss,learning_rate,validation_loss,validation_score"]
    for expert in experts:
        for step in range(1, steps + 1):
            validation = f"{5 / step + 0.2:.3f},{60 / step:.2f}" if step % 10 == 0 else ","
            lines.append(f"{expert},{step},{5 / step:.3f},0.001,{validation}")
    return "\n".join(lines) + "\n"


def diagnosis(experts: list[str], layers: int = 4) -> dict[str, Any]:
    """Every level with some figures undefined, as in `Diagnosis.to_json`."""
    places = [("tensor", f"decoder.layers.{n}.fc1.weight") for n in range(layers)]
    places += [("layer", f"decoder.layers.{n}") for n in range(layers)] + [("part", "decoder"), ("model", "model")]
    whole = "energy norm relative_norm energy_share effective_rank effective_rank_ratio stable_rank".split()
    pair = "cosine sign_conflict weighted_sign_conflict predicted_loss".split()
    space = (
        "left_overlap left_chance left_angle left_smallest right_overlap right_chance right_angle right_smallest "
        "interference"
    ).split()
    pairs = [(a, b) for i, a in enumerate(experts) for b in experts[i + 1 :]]
    found: dict[str, Any] = {
        "base": "starter",
        "scaling": 0.5,
        "rank_ratios": [0.05, 0.1, 0.2],
        "experts": [],
        "spectra": [],
        "pairs": [],
        "subspaces": [],
    }
    for level, name in places:
        here = {"level": level, "name": name}
        found["experts"] += [{**here, "expert": e, **dict.fromkeys(whole, 0.25), "stable_rank": None} for e in experts]
        found["spectra"] += [
            {**here, "expert": e, "rank_ratio": r, "retained_energy": r**0.5} for e in experts for r in (0.05, 0.1, 1.0)
        ]
        found["pairs"] += [{**here, "first": a, "second": b, **dict.fromkeys(pair, 0.125)} for a, b in pairs]
        found["subspaces"] += [
            {**here, "first": a, "second": b, "rank_ratio": r, **dict.fromkeys(space, 0.5)}
            for a, b in pairs
            for r in found["rank_ratios"]
        ]
    return found


def write_sweep(folder: Path) -> Path:
    """Two variants of a rank ratio."""
    listed = []
    for ratio in (0.05, 0.1):
        name = f"rank_ratio={ratio}"
        write_run(folder / name, rank_ratio=ratio, seed=round(100 * ratio))
        listed.append({"name": name, "folder": name, "changes": {"prune.rank_ratio": ratio}, "seed": 3})
    (folder / "sweep.json").write_text(json.dumps({"variants": listed}), encoding="utf-8")
    return folder
