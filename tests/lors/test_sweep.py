"""Grids and seeds as one graph."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lors.errors import ConfigError
from lors.store import Store
from lors.sweep import build_variants, parse_grid, sweep_table, variants


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "experiment.yaml"
    speech = {"source": "synthetic", "utterances": {"train": 8, "validation": 4, "test": 4}}
    settings = {"base": "starter", "languages": ["es", "fr"], "corpora": speech, "compare": ["task_arithmetic"]}
    places = {"output": str(tmp_path / "out"), "store": str(tmp_path / "store")}
    path.write_text(yaml.safe_dump({**settings, **places, "merge": {"scaling": {"search": [0.2, 0.5]}}}))
    return path


def test_a_grid_is_every_combination_in_order(file: Path, tmp_path: Path) -> None:
    grid = parse_grid(["prune.rank_ratio=0.05,0.1", "prune.composition=additive, sparse"])
    found = variants(file, [], grid)
    assert [variant.name for variant in found] == [
        f"rank_ratio={rank} composition={how}" for rank in (0.05, 0.1) for how in ("additive", "sparse")
    ]
    assert [variant.experiment.prune.rank_ratio for variant in found] == [0.05, 0.05, 0.1, 0.1]
    assert found[1].experiment.output == tmp_path / "out" / "rank_ratio=0.05_composition=sparse"
    assert found[1].columns == {"prune.rank_ratio": 0.05, "prune.composition": "sparse"}


def test_lists_and_alike_names_are_told_apart(file: Path) -> None:
    grid = parse_grid(["finetune.steps=5,6", "merge.parameters={ties: {density: 0.1}}", "evaluate.guard=[it],[]"])
    assert grid["evaluate.guard"] == [["it"], []]
    alike = parse_grid(["prune.density=0.1", "merge.groups.encoder.density=0.2"])
    names = [variant.name for variant in variants(file, [], alike)]
    assert names == ["prune.density=0.1 merge.groups.encoder.density=0.2"]


def test_points_that_are_spelt_alike_have_names_and_folders_of_their_own(file: Path) -> None:
    found = variants(file, ["seeds=[0, 1]"], parse_grid(['prune.exclude=[],["*"],["a"]', "prune.rank_ratio=0.1"]))
    assert len({variant.name for variant in found}) == len({variant.folder for variant in found}) == 6
    assert len({variant.experiment.output for variant in found}) == 6
    assert found[4].folder == "exclude=_a_rank_ratio=0.1_seed=0"  # nothing is added where none is alike
    again = variants(file, [], parse_grid(['prune.exclude=["*"],[]', "prune.rank_ratio=0.1"]))
    assert f"{again[1].folder}_seed=0" == found[0].folder
    assert len({variant.name for variant in variants(file, [], parse_grid(['evaluate.batch_seconds=20,"20"']))}) == 2


def test_one_seed_is_said_once(file: Path) -> None:
    grid = parse_grid(["finetune.seed=5,6"])
    assert [variant.experiment.finetune.seed for variant in variants(file, [], grid)] == [5, 6]
    with pytest.raises(ConfigError, match=r"--grid finetune\.seed and `seeds` both say the seed"):
        variants(file, ["seeds=[0, 1]"], grid)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["prune.density"], "is not key=value,value"),
        (["prune.density="], "is not key=value,value"),
        (["prune.density=[0.1"], "the values are not valid YAML"),
        (["prune.density=2020-13-01"], "the values are not valid YAML"),
        (["prune.density=2020-01-01,0.1"], "YAML reads a value as a date or the like"),
        (["prune.density=0.1,0.1"], r"has 0\.1 twice"),
        (["prune.density=0.1", "prune.density=0.2"], "is given twice"),
        (["output=a,b"], "is of the whole sweep: change it with --set"),
    ],
)
def test_a_grid_that_cannot_be_read(given: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        parse_grid(given)


def test_a_value_that_is_not_allowed_is_named(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"prune\.rank_ratio should be"):
        variants(file, [], parse_grid(["prune.rank_ratio=0.1,7"]))


def test_what_variants_have_in_common_is_one_step(file: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    found = variants(file, [], parse_grid(["prune.rank_ratio=0.05,0.1"]))
    steps, (first, second) = build_variants(found, store)
    again = {name for name in second if second[name] != name}
    assert all(steps[there].name == there for names in (first, second) for there in names.values())
    assert [name for name, there in first.items() if name != there] == []
    stages = {steps[second[name]].stage for name in again}
    assert {name for name in again if name.startswith(("prepare", "fine-tune", "extract", "diagnose"))} == set()
    assert "prune_task_vector" in stages
    assert not any("task_arithmetic" in name for name in again)
    assert steps[second["combine lors"]].inputs["es-transcribe"].step == "prune es-transcribe [rank_ratio=0.1]"
    order = list(steps)
    for step in steps.values():
        assert all(order.index(source.step) < order.index(step.name) for source in step.inputs.values())


def test_another_seed_trains_everything_again_and_the_base_once(file: Path, tmp_path: Path) -> None:
    found = variants(file, ["seeds=[3, 4]"], {})
    assert [(v.name, v.seed, v.experiment.finetune.seed, v.experiment.seeds) for v in found] == [
        ("seed=3", 3, 3, None),
        ("seed=4", 4, 4, None),
    ]
    steps, _ = build_variants(found, Store(tmp_path / "store"))
    trained = [name for name, step in steps.items() if step.stage == "fine_tune"]
    assert len(trained) == 2 * 4
    assert [name for name in steps if name.startswith("evaluate base")] == ["evaluate base es", "evaluate base fr"]


def test_the_table_has_means_and_spreads_over_seeds(file: Path) -> None:
    found = variants(file, ["seeds=[0, 1]"], parse_grid(["prune.density=0.1,0.2"]))

    def summary(recovery: float | None) -> dict[str, Any]:
        return {
            "systems": {"lors": {"recovery": recovery, "wer": 20.0}, "touched_up": {"recovery": recovery, "wer": 19.0}},
            "validation": {"lors": 30.0, "touched_up": 29.0},
        }

    rows, table = sweep_table(list(zip(found, map(summary, (0.2, 0.4, 0.5, None)), strict=True)))
    touched_up, rows = rows[1::2], rows[::2]
    assert [row["validation"] for row in touched_up] == [29.0, 29.0]
    assert [row["prune.density"] for row in rows] == [0.1, 0.2]
    assert rows[0]["recovery"] == pytest.approx(0.3)
    assert rows[0]["recovery_sd"] == pytest.approx(0.1414, abs=1e-3)
    assert (rows[1]["recovery"], rows[1]["wer"], rows[0]["validation"], rows[0]["seeds"]) == (None, 20.0, 30.0, 2)
    assert "| 0.1 | lors | 2 | 30.0 ± 0.0 | 0.30 ± 0.14 | 20.0 ± 0.0 |" in table
    json.dumps(rows)
