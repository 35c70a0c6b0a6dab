from __future__ import annotations

import json
import os
import resource
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lors.blocks import row_blocks
from lors.checkpoint import Checkpoint
from lors.delta_file import DeltaFile, write, write_dense
from lors.errors import CheckpointError, InputError
from lors.prune import COMPOSITIONS, DTYPES, PruneSettings, prune_task_vector
from lors.task_vector import extract


@pytest.fixture
def deltas(tiny_whisper_folder):
    return dict(extract(Checkpoint(tiny_whisper_folder(0)), Checkpoint(tiny_whisper_folder(1))))


def compact(path, composition="additive", dtype="float32", shape=(40, 90), **options):
    """A file of one pruned tensor, `fc`, and one bias."""
    rng = np.random.default_rng(0)
    given = {"fc": shape, "bias": (6,)}
    deltas = {name: torch.from_numpy(rng.normal(0, 1e-3, sides).astype(np.float32)) for name, sides in given.items()}
    settings = PruneSettings(composition=composition, **options)
    pruned = prune_task_vector(deltas.items(), settings, dtype)
    return write(path, pruned, base_digest="b", settings=settings)


def rewrite(path, change):
    """The same file with its tensors (by key) and metadata changed in place."""
    with safe_open(path, framework="pt") as handle:
        tensors = {key: handle.get_tensor(key).clone() for key in handle.keys()}  # noqa: SIM118
        metadata = json.loads(handle.metadata()["lors"])
    change(tensors, metadata)
    save_file(tensors, path, metadata={"lors": json.dumps(metadata)})


@pytest.mark.parametrize("composition", COMPOSITIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("density", [0.2, 1e-6])  # 1e-6: sparse parts of no entry
def test_pruned_round_trip_is_exact_and_deterministic(deltas, tmp_path, composition, dtype, density):
    settings = PruneSettings(
        composition=composition,
        density=density,
        vectors="drop",
        exclude=("positions",),
        groups={"*fc1*": {"density": 1}},
    )
    pruned = dict(prune_task_vector(deltas.items(), settings, dtype))
    one, two = {"id": "é", "seed": 1}, {"seed": 1, "id": "é"}
    file = write(tmp_path / "a.safetensors", pruned.items(), base_digest="b" * 64, settings=settings, provenance=one)
    again = write(
        tmp_path / "deep" / "b.safetensors", pruned.items(), base_digest="b" * 64, settings=settings, provenance=two
    )
    assert file.digest() == again.digest()
    assert file.names == tuple(sorted(deltas))
    assert file.settings == settings
    assert file.dtype == dtype
    assert file.base_digest == "b" * 64
    assert file.metadata["provenance"] == one
    for name, part in pruned.items():
        facts = file.metadata["tensors"][name]
        assert torch.equal(file.delta(name), part.dense())
        assert file.shape(name) == part.shape == tuple(file.delta(name).shape)
        assert file.parts(name).retained_energy == part.retained_energy == facts["retained_energy"]
        assert facts.get("rank") == (None if part.us is None else part.us.shape[1])
        assert facts.get("count", 0) == (part.indices.count if part.indices else part.count)
        stored = file.parts(name).parts()
        assert stored.keys() == part.parts().keys()
        for key, tensor in part.parts().items():
            assert stored[key].dtype == tensor.dtype
            assert torch.equal(stored[key], tensor)
    lost, energy = (sum(getattr(part, key) for part in pruned.values()) for key in ("error", "energy"))
    assert file.retained_energy == file.metadata["retained_energy"] == pytest.approx(1 - lost / energy)
    assert 0 < file.retained_energy < 1


@pytest.mark.parametrize("composition", [*COMPOSITIONS, "whole"])
def test_rows_have_the_bits_of_the_dense_delta_in_any_number_of_threads(tmp_path, composition):
    path, shape = tmp_path / "a.safetensors", (900, 700)
    if composition == "whole":
        file = compact(path, exclude=("*",), shape=shape)
    else:
        file = compact(path, composition, "int8", shape=shape)
    dense = {name: file.delta(name) for name in file.names}
    assert torch.equal(file.rows("bias", 0, 6), dense["bias"])
    assert len(row_blocks(shape)) == 3

    def walk(_):
        return all(
            torch.equal(torch.cat([file.rows(name, *block) for block in row_blocks(file.shape(name))]), dense[name])
            for name in file.names * 3
        )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(walk, range(8)))
    assert torch.allclose(file.rows("fc", 5, 7), dense["fc"][5:7], atol=1e-9)


def test_rows_read_a_tensor_once(tmp_path, monkeypatch):
    file = compact(tmp_path / "a.safetensors", shape=(900, 700))
    calls = []
    parts = file.parts
    monkeypatch.setattr(file, "parts", lambda name: calls.append(name) or parts(name))
    for block in row_blocks((900, 700)):
        file.rows("fc", *block)
    file.rows("bias", 0, 6)
    assert calls == ["fc"]


def test_dense_round_trip_is_plain_safetensors(deltas, tmp_path):
    file = write_dense(tmp_path / "tau.safetensors", deltas.items(), base_digest="d")
    assert file.settings is None
    assert file.retained_energy == 1
    assert {f"{name}/whole" for name in deltas} == load_file(file.path).keys()
    for name, delta in file.items():
        assert torch.equal(delta, deltas[name])


def test_empty_tensors_and_one_of_no_dimensions(tmp_path):
    deltas = {"none": torch.empty(0, 3), "one": torch.tensor(2.5)}
    file = write_dense(tmp_path / "tau.safetensors", deltas.items(), base_digest="d")
    assert file.delta("none").shape == (0, 3)
    assert file.delta("one").item() == file.rows("one", 0, 1).item() == 2.5
    assert write_dense(tmp_path / "empty.safetensors", [], base_digest="d").names == ()


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


@pytest.mark.parametrize("room", [100_000, 400_100])  # in the spool; in the file itself
def test_a_full_disk_leaves_nothing(tmp_path, room):
    path = tmp_path / "tau.safetensors"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(InputError, match=rf"^cannot write {path} \(File too large\); choose a place"):
            write_dense(path, [("a", torch.ones(100_000)), ("b", torch.ones(9))], base_digest="d")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_refuses_what_is_no_delta_file(deltas, tmp_path):
    path = tmp_path / "tau.safetensors"
    with pytest.raises(CheckpointError, match=r"tau.safetensors cannot be read"):
        DeltaFile(path)
    write_dense(path, deltas.items(), base_digest="d")
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CheckpointError, match=r"tau.safetensors cannot be read"):
        DeltaFile(path)
    whole = {"format": "lors.delta", "version": 2, "settings": None, "base": "d", "dtype": "float32"}
    for metadata, message in [
        ({"format": "pt"}, "is not a LoRS delta file of version 2; write it with `lors prune`"),
        ({"lors": '{"format": "lors.delta", "version": 1}'}, "of version 1, and this LoRS reads version 2; write it"),
        ({"lors": '{"format": "lors.delta", "version": 2}'}, "broken delta metadata"),
        ({"lors": json.dumps(whole | {"tensors": {"a": {"shape": [-1], "energy": 0, "error": 0}}})}, "broken delta"),
        ({"lors": json.dumps(whole | {"tensors": {}, "dtype": "int4"})}, "broken delta metadata"),
        ({"lors": "[]"}, "broken delta metadata"),
        ({"lors": "{"}, "broken delta metadata"),
    ]:
        save_file({"a": torch.ones(2)}, path, metadata=metadata)
        with pytest.raises(CheckpointError, match=message):
            DeltaFile(path)


def set_value(key, at, value):
    def change(tensors, _):
        tensors[key].reshape(-1)[at] = value

    return change


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({}, set_value("fc/us", 3, float("nan")), "part us holds NaN"),
        ({"dtype": "bfloat16"}, set_value("fc/values", 3, float("inf")), "part values holds NaN or infinity"),
        ({"dtype": "int8"}, set_value("fc/scale", 0, float("nan")), "part scale holds NaN"),
        ({}, lambda tensors, _: tensors.pop("fc/vh"), "one of its parts is missing"),
        ({"dtype": "int8"}, lambda tensors, _: tensors.pop("fc/scale"), "one of its parts is missing"),
        ({}, lambda tensors, _: tensors.pop("fc/values"), "one of its parts is missing"),
        ({}, lambda tensors, _: tensors.pop("fc/counts"), "the counts of its indices are missing"),
        ({}, set_value("fc/counts", -1, 255), "the positions of its indices are missing or of another length"),
        ({}, set_value("fc/positions", -1, 254), "an index is out of range"),
        ({}, set_value("fc/positions", slice(0, 2), 7), "indices are not rising"),
        ({"density": 0.5}, set_value("fc/mask", 0, 255), "part values is"),
        ({}, lambda tensors, _: tensors.update({"fc/us": tensors["fc/us"][:-1].clone()}), r"part us is \[39, 4\]"),
        ({}, lambda tensors, _: tensors.update({"fc/us": tensors["fc/us"].half()}), "part us is .*float16"),
        (
            {"composition": "sequential"},
            lambda _, metadata: metadata["tensors"]["fc"].update(count=359),
            "its threshold keeps 360 entries, not the 359 that were stored",
        ),
        (
            {"composition": "sequential"},
            lambda _, metadata: metadata["tensors"]["fc"].update(threshold=-1.0),
            "its threshold has no factors, or is not positive",
        ),
    ],
)
def test_refuses_broken_parts_naming_the_tensor(tmp_path, options, change, message):
    path = tmp_path / "es.safetensors"
    compact(path, **options)
    rewrite(path, change)
    file = DeltaFile(path)
    assert file.delta("bias").shape == (6,)
    for read in (file.delta, lambda name: file.rows(name, 0, 40)):
        with pytest.raises(CheckpointError, match=rf"es.safetensors: the tensor fc[: ].*{message}"):
            read("fc")


def test_refuses_nan_in_a_whole_tensor(tmp_path):
    path = tmp_path / "es.safetensors"
    compact(path)
    rewrite(path, set_value("bias/whole", 5, float("nan")))
    for read in (DeltaFile(path).delta, lambda name: DeltaFile(path).rows(name, 4, 6)):
        with pytest.raises(CheckpointError, match=r"the tensor bias is corrupt .its part whole holds NaN"):
            read("bias")


def test_refuses_a_place_that_cannot_be_written(deltas, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"):
        write_dense(tmp_path / "file" / "tau.safetensors", deltas.items(), base_digest="d")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="cannot write"):
        write_dense(tmp_path / "folder", deltas.items(), base_digest="d")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
