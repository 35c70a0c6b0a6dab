from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from lors.checkpoint import Checkpoint
from lors.delta_file import DeltaFile, write, write_dense
from lors.errors import CheckpointError, InputError
from lors.prune import COMPOSITIONS, PruneSettings, prune_task_vector
from lors.task_vector import extract


@pytest.fixture
def deltas(tiny_whisper_folder):
    return dict(extract(Checkpoint(tiny_whisper_folder(0)), Checkpoint(tiny_whisper_folder(1))))


@pytest.mark.parametrize("composition", COMPOSITIONS)
@pytest.mark.parametrize("density", [0.2, 1e-6])  # 1e-6: sparse parts of no entry
def test_pruned_round_trip_is_exact_and_deterministic(deltas, tmp_path, composition, density):
    settings = PruneSettings(composition=composition, density=density, vectors="drop", exclude=("*embed_positions*",))
    pruned = dict(prune_task_vector(deltas.items(), settings))
    one, two = {"id": "é", "seed": 1}, {"seed": 1, "id": "é"}
    file = write(tmp_path / "a.safetensors", pruned.items(), base_digest="b" * 64, settings=settings, provenance=one)
    again = write(
        tmp_path / "deep" / "b.safetensors", pruned.items(), base_digest="b" * 64, settings=settings, provenance=two
    )
    assert file.digest() == again.digest()
    assert file.names == tuple(sorted(deltas))
    assert file.settings == settings
    assert file.base_digest == "b" * 64
    assert file.metadata["provenance"] == one
    for name, part in pruned.items():
        assert torch.equal(file.delta(name), part.dense())
        assert file.shape(name) == part.shape == tuple(file.delta(name).shape)
        assert file.parts(name).retained_energy == part.retained_energy
        for key, tensor in part.parts().items():
            stored = getattr(file.parts(name), key)
            assert stored.dtype == tensor.dtype
            assert torch.equal(stored, tensor)
    lost, energy = (sum(getattr(part, key) for part in pruned.values()) for key in ("error", "energy"))
    assert file.retained_energy == pytest.approx(1 - lost / energy)
    assert 0 < file.retained_energy < 1


def test_dense_round_trip_is_plain_safetensors(deltas, tmp_path):
    file = write_dense(tmp_path / "tau.safetensors", deltas.items(), base_digest="d")
    assert file.settings is None
    assert file.retained_energy == 1
    assert {f"{name}/whole" for name in deltas} == load_file(file.path).keys()
    for name, delta in file.items():
        assert torch.equal(delta, deltas[name])


def test_interrupted_write_leaves_the_old_file(deltas, tmp_path):
    path = tmp_path / "tau.safetensors"
    digest = write_dense(path, deltas.items(), base_digest="d").digest()

    def interrupted():
        yield next(iter(deltas.items()))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_dense(path, interrupted(), base_digest="d")
    assert [file.name for file in tmp_path.iterdir()] == ["tau.safetensors"]
    assert DeltaFile(path).digest() == digest


def test_refuses_what_is_no_delta_file(deltas, tmp_path):
    path = tmp_path / "tau.safetensors"
    with pytest.raises(CheckpointError, match=r"tau.safetensors cannot be read"):
        DeltaFile(path)
    write_dense(path, deltas.items(), base_digest="d")
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CheckpointError, match=r"tau.safetensors cannot be read"):
        DeltaFile(path)
    for metadata, message in [
        ({"format": "pt"}, "is not a LoRS delta file of version 1"),
        ({"lors": '{"format": "lors.delta", "version": 2}'}, "is not a LoRS delta file of version 1"),
        ({"lors": '{"format": "lors.delta", "version": 1}'}, "broken delta metadata"),
        ({"lors": "[]"}, "broken delta metadata"),
        ({"lors": "{"}, "broken delta metadata"),
    ]:
        save_file({"a": torch.ones(2)}, path, metadata=metadata)
        with pytest.raises(CheckpointError, match=message):
            DeltaFile(path)


def test_refuses_a_place_that_cannot_be_written(deltas, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"):
        write_dense(tmp_path / "file" / "tau.safetensors", deltas.items(), base_digest="d")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="cannot write"):
        write_dense(tmp_path / "folder", deltas.items(), base_digest="d")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
