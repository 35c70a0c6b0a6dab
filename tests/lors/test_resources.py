"""How steps share the machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lors import resources
from lors.config import parse_experiment
from lors.errors import ConfigError


def experiment(**own: Any) -> Any:
    data = {"base": "starter", "languages": ["es", "fr"], "corpora": {"source": "synthetic"}, "output": "out"}
    return parse_experiment({**data, "resources": own})


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eight cores, no GPU, no quota."""
    monkeypatch.setattr(resources.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(resources, "_NVIDIA", tmp_path / "gpus")
    monkeypatch.setattr(resources, "_QUOTA", tmp_path / "cpu.max")
    for name in ("CUDA_VISIBLE_DEVICES", "LORS_CORES"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_cores_within_the_containers_quota(machine: Path) -> None:
    assert resources.cores() == 8
    for text, count in (("250000 100000", 2), ("50000 100000", 1), ("max 100000", 8), ("9000000 100000", 8)):
        (machine / "cpu.max").write_text(text + "\n")
        assert resources.cores() == count


def test_a_worker_may_be_given_fewer_cores(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text, count in (("3", 3), ("0", 1), ("", 8), ("many", 8)):
        monkeypatch.setenv("LORS_CORES", text)
        assert resources.cores() == count


def test_devices(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resources.devices() == []
    for name in ("0000:01:00.0", "0000:02:00.0"):
        (machine / "gpus" / name).mkdir(parents=True)
    assert resources.devices() == ["0", "1"]
    for value, found in (("", []), ("-1", []), ("3, GPU-8a", ["3", "GPU-8a"])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        assert resources.devices() == found


def test_shares(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resources.shares(experiment()) == (4, 2, [])  # four experts
    assert resources.shares(experiment(parallel=2)) == (2, 4, [])
    assert resources.shares(experiment(parallel=20)) == (20, 1, [])
    assert resources.shares(experiment(threads=1)) == (4, 1, [])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert resources.shares(experiment()) == (2, 4, ["0", "1"])


def test_processes_that_train_together_share_the_cores_or_have_a_gpu_each(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert resources.shares(experiment(processes=2)) == (2, 2, [])
    assert resources.shares(experiment(processes=16)) == (1, 1, [])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4")
    assert resources.shares(experiment(processes=2)) == (2, 2, ["0,1", "2,3"])
    with pytest.raises(ConfigError, match="processes is 6, but this process may use 5 GPUs"):
        resources.shares(experiment(processes=6))
