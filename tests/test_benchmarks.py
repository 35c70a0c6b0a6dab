"""The benchmarks run, on our side alone and on a tiny model; what they measure is not judged here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base and two experts of the smallest size."""
    folder = tmp_path_factory.mktemp("benchmark")
    command = [sys.executable, "benchmarks/models.py", str(folder), "mini", "2"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder


def test_an_expert_is_its_base_plus_a_small_change_of_decaying_spectrum(work: Path) -> None:
    base, expert = (load_file(work / "mini" / name / "model.safetensors") for name in ("base", "e1"))
    assert "proj_out.weight" not in base
    for name, weight in base.items():
        delta = expert[name] - weight
        if name == "model.encoder.embed_positions.weight":
            assert not delta.any()
            continue
        assert np.linalg.norm(delta) / np.linalg.norm(weight) == pytest.approx(0.01, rel=1e-3)
    fc1 = "model.decoder.layers.0.fc1.weight"
    spectrum = np.linalg.svd(expert[fc1] - base[fc1], compute_uv=False)
    assert spectrum[0] > 3 * spectrum[8] > 0


def benchmark(work: Path, only: str) -> tuple[str, dict[str, float]]:
    """What merge.py prints, and its last line read."""
    command = [sys.executable, "benchmarks/merge.py", "--work", str(work), "--sizes", "mini", "--experts", "2"]
    done = subprocess.run([*command, "--only", only], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout, json.loads(done.stdout.splitlines()[-1])


def test_merging_is_measured_without_the_peers(work: Path) -> None:
    printed, figures = benchmark(work, "mini task")
    assert "mergekit is not under --peers" in printed
    assert "mini task_arithmetic                lors          " in printed
    assert figures == {"rows": 1, "failed": 0}
    assert not (work / "out").exists()


def test_pruning_is_compared_with_a_full_svd(work: Path) -> None:
    printed, figures = benchmark(work, "lors_pruning")
    assert "FAILED" not in printed
    assert figures["failed"] == 0
    assert 0 < figures["mini lors_pruning distance"] < 1e-5
    assert figures["mini lors_pruning times_faster"] > 0


def test_a_command_that_fails_is_a_row_of_the_table(work: Path) -> None:
    weights = work / "mini" / "e1" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:5000])
    try:
        printed, figures = benchmark(work, "mini task")
    finally:
        weights.write_bytes(whole)
    assert "FAILED: lors: " in printed
    assert figures == {"rows": 1, "failed": 1}
