"""The evaluation of a model as a step, on the starter base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from lors import stages
from lors.checkpoint import Checkpoint
from lors.delta_file import DeltaFile, write
from lors.errors import ConfigError
from lors.model_writer import write_model_folder
from lors.prune import PruneSettings, prune_task_vector
from lors.speech.transcribe import token_limit
from lors.starter import MODEL_FOLDER
from lors.task_vector import apply

BASE = str(MODEL_FOLDER)
BOTH = {"language": "es", "split": "test", "tasks": ["transcribe", "translate"], "beams": 1, "window": "auto"}
BOTH |= {"batch_seconds": 5.0, "backend": "transformers", "identify": True}
COLUMNS = "id language task split speaker seconds source reference hypothesis window tokens truncated spoken free"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six Spanish sentences."""
    out = tmp_path_factory.mktemp("corpus")
    settings = {"language": "es", "split": "test", "source": "synthetic", "seed": 3, "limit": 6}
    settings |= {"min_seconds": 0.1, "max_seconds": 3.5, "max_rejected": 0.05}
    stages.prepare_split(settings, places={}, out=str(out), report=lambda event: None)
    return out


def evaluated(corpus: Path, folder: Path, report: Any = lambda event: None, **changes: Any) -> pd.DataFrame:
    """The hypotheses of the starter, or of the input of that name, with these settings."""
    inputs = {name: changes.pop(name) for name in ("model", "compact") if name in changes}
    places = {} if "model" in inputs else {"base": BASE}
    for name in ("out", "work"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    done = stages.evaluate_model(
        settings={**BOTH, **changes},
        inputs={"corpus": str(corpus), **inputs},
        places=places,
        out=str(folder / "out"),
        work=str(folder / "work"),
        threads=1,
        report=report,
        processes=1,
        digests={},
    )
    table = pd.read_parquet(folder / "out" / "hypotheses.parquet")
    assert done == {"hypotheses": len(table)}
    return table


def test_the_table_has_both_tasks_and_what_the_model_hears(corpus: Path, tmp_path: Path) -> None:
    table = evaluated(corpus, tmp_path / "both")
    assert list(table.columns) == COLUMNS.split()
    own = {task: rows.reset_index(drop=True) for task, rows in table.groupby("task")}
    written, translated = own["transcribe"], own["translate"]
    assert len(written) == len(translated) == 6
    assert written.source.equals(written.reference)
    assert written.source.equals(translated.source)
    assert written.spoken.equals(translated.spoken)
    assert translated.free.isna().all()
    agree = written.spoken == "es"
    assert (written.free == written.hypothesis)[agree].all()
    assert set(agree) == {True, False}
    assert (table.tokens <= [token_limit(seconds, 124) for seconds in table.seconds]).all()
    plain = evaluated(corpus, tmp_path / "plain", identify=False)
    assert plain.spoken.isna().all()
    assert plain.free.isna().all()
    pd.testing.assert_frame_equal(plain.drop(columns=["spoken", "free"]), table.drop(columns=["spoken", "free"]))
    for task, rows in own.items():
        apart = evaluated(corpus, tmp_path / task, tasks=[task])
        pd.testing.assert_frame_equal(apart.fillna(""), rows.fillna(""), check_dtype=False)


def test_an_interrupted_step_goes_on_after_its_last_batch(corpus: Path, tmp_path: Path) -> None:
    whole = evaluated(corpus, tmp_path / "whole")
    events: list[Any] = []

    def stop(event: Any) -> None:
        events.append(event)
        if len(events) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluated(corpus, tmp_path / "stopped", stop)
    kept = (tmp_path / "stopped" / "work" / "hypotheses.jsonl").read_bytes()
    assert kept.count(b"\n") == 2
    stopped, calls = len(events), []
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, *_: calls.append(type(module).__name__) if type(module).__name__ == "WhisperEncoder" else None
    )
    pd.testing.assert_frame_equal(evaluated(corpus, tmp_path / "stopped", events.append), whole)
    hook.remove()
    assert len(events) - stopped > 2
    assert len(calls) == len(events) - stopped - 2
    assert [event["done"] for event in events[stopped:]][-1] == 6
    assert events[-1] == {"done": 6, "total": 6, "unit": "utterances"}


def test_a_compact_expert_is_decoded_as_the_base_merged_with_it(corpus: Path, tmp_path: Path) -> None:
    base, generator = Checkpoint(BASE), torch.Generator().manual_seed(1)
    deltas = [
        (name, 0.2 * base.tensor(name).std() * torch.randn(base.shape(name), generator=generator))
        for name in base.float_names
    ]
    settings = PruneSettings(rank_ratio=0.2, density=0.1)
    (tmp_path / "compact").mkdir()
    file = tmp_path / "compact" / "task_vector.safetensors"
    write(file, prune_task_vector(iter(deltas), settings), base_digest=base.digest(), settings=settings)
    vector = DeltaFile(file)
    merged = ((name, apply(base.tensor(name), vector.delta(name), 1.0)) for name in base.float_names)
    write_model_folder(tmp_path / "merged", base, merged)
    switched = evaluated(corpus, tmp_path / "switched", compact=str(file.parent))
    pd.testing.assert_frame_equal(switched, evaluated(corpus, tmp_path / "one", model=str(tmp_path / "merged")))
    assert (switched.hypothesis != evaluated(corpus, tmp_path / "base").hypothesis).any()


def test_ctranslate2_writes_the_same_table(corpus: Path, tmp_path: Path) -> None:
    pytest.importorskip("ctranslate2")
    other = evaluated(corpus, tmp_path / "other", backend="ctranslate2")
    pd.testing.assert_frame_equal(other, evaluated(corpus, tmp_path / "own"))
    with pytest.raises(ConfigError, match="beam search"):
        evaluated(corpus, tmp_path / "beams", backend="ctranslate2", beams=2)
