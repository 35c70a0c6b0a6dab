"""The table of results in each of its files."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

import lors
from lors.errors import InputError
from lors.scoring.files import write_results
from lors.scoring.results import main_rows, score_tables


@pytest.fixture
def frame() -> pd.DataFrame:
    rows = [
        {"id": f"u{i}", "language": "es", "task": task, "split": "test", "speaker": None, "window": 7.0}
        | {"reference": "uno dos tres cuatro", "hypothesis": "uno dos tres catorce", "truncated": False}
        for i in range(3)
        for task in ("transcribe", "translate")
    ]
    return score_tables(
        {"base": pd.DataFrame(rows), "NA": pd.DataFrame(rows), "1000": pd.DataFrame(rows)}, resamples=20
    )


def test_every_file_gives_the_same_table(frame: pd.DataFrame, tmp_path: Path) -> None:
    write_results(frame, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"results.csv", "results.parquet", "results.json"}
    for path in (tmp_path, *tmp_path.iterdir()):
        pd.testing.assert_frame_equal(lors.load_results(path), frame)
    (tmp_path / "results.parquet").unlink()
    pd.testing.assert_frame_equal(lors.load_results(str(tmp_path)), frame)


def test_names_that_look_like_numbers_stay_names(frame: pd.DataFrame, tmp_path: Path) -> None:
    write_results(frame[frame["system"] == "1000"], tmp_path)
    for path in tmp_path.iterdir():
        assert set(lors.load_results(path)["system"]) == {"1000"}, path.name


def test_a_sweep_s_columns_are_kept_and_mixed_ones_are_texts(frame: pd.DataFrame, tmp_path: Path) -> None:
    variants = [frame.assign(**{"prune.density": 0.1 * i, "window_asked": own}) for i, own in enumerate(("auto", 7.0))]
    sweep = pd.concat(variants, ignore_index=True)
    write_results(sweep, tmp_path)
    for path in tmp_path.iterdir():
        pd.testing.assert_frame_equal(lors.load_results(path), sweep.astype({"window_asked": str}))
    assert len(main_rows(lors.load_results(tmp_path))) == 2 * len(main_rows(frame)) == 2 * 3 * 2


def test_what_is_no_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no results: name the `output` of a run"):
        lors.load_results(tmp_path)
    with pytest.raises(InputError, match=r"is no results table: name an output folder"):
        lors.load_results(tmp_path / "results.csv")
    (tmp_path / "results.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"results\.parquet cannot be read as a table"):
        lors.load_results(tmp_path)
    (tmp_path / "other.csv").write_text("system,value\nbase,1\n")
    with pytest.raises(InputError, match=r"no column language, task, metric"):
        lors.load_results(tmp_path / "other.csv")
