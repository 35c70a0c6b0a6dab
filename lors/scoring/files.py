"""The table of results on disk: CSV for people, Parquet and JSON for programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import pandas as pd

from lors.errors import InputError

__all__ = ["load_results", "write_results"]

_NAME: Final = "results"
_NEEDED: Final = ("system", "language", "task", "metric", "value")


def write_results(frame: pd.DataFrame, folder: Path) -> None:
    """Write results.csv, results.parquet and results.json (a list of records) into a folder that is there.

    A sweep's column of numbers and texts, such as a window of 7.0 or "auto", is written as texts.
    """
    mixed = [name for name in frame if pd.api.types.infer_dtype(frame[name]).startswith("mixed")]
    frame = frame.astype(dict.fromkeys(mixed, str))
    frame.to_csv(folder / f"{_NAME}.csv", index=False)
    frame.to_parquet(folder / f"{_NAME}.parquet", index=False)
    frame.to_json(folder / f"{_NAME}.json", orient="records", indent=1, force_ascii=False, double_precision=15)


def load_results(path: str | Path) -> pd.DataFrame:
    """The tidy table of an output folder, or of one of its results.parquet, .csv and .json: one row a system,
    language, task, split, metric and normaliser; of a sweep a column more for every setting that differs.

    Raises InputError where there is none, or the file is not such a table.
    """
    file = Path(path)
    if file.is_dir():
        found = [file / f"{_NAME}{suffix}" for suffix in _READERS if (file / f"{_NAME}{suffix}").is_file()]
        if not found:
            raise InputError(f"the folder {file} has no results: name the `output` of a run, or run it first")
        file = found[0]
    reader = _READERS.get(file.suffix)
    if reader is None or not file.is_file():
        raise InputError(f"{file} is no results table: name an output folder or a {_NAME}.csv, .parquet or .json in it")
    try:
        frame: pd.DataFrame = reader(file)
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read as a table ({error}): run or score again to write it anew") from error
    missing = [name for name in _NEEDED if name not in frame.columns]
    if missing:
        raise InputError(f"{file} has no column {', '.join(missing)}, so it is no results table of LoRS")
    return frame


# A system may be named "1000", as a checkpoint's folder is.
_TEXTS: Final = dict.fromkeys(
    ("system", "language", "task", "split", "metric", "normaliser", "signature", "window"), str
)


def _csv(file: Path) -> pd.DataFrame:
    # "None" and "NA" are names that a normaliser or a model may have; only an empty cell is missing.
    return pd.read_csv(file, keep_default_na=False, na_values=[""], dtype=_TEXTS)


def _json(file: Path) -> pd.DataFrame:
    return pd.read_json(file, orient="records", dtype=_TEXTS, convert_dates=False, precise_float=True)


_READERS: Final[dict[str, Any]] = {".parquet": pd.read_parquet, ".csv": _csv, ".json": _json}
