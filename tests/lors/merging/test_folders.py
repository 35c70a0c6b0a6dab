from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lors.checkpoint import Checkpoint
from lors.delta_file import write, write_dense
from lors.errors import CheckpointError, InputError
from lors.merging import make_recipe
from lors.merging.folders import merge_folders
from lors.prune import PruneSettings, prune_delta, prune_task_vector
from lors.task_vector import extract


@pytest.fixture
def models(tiny_whisper_folder) -> dict[str, Path]:
    """A base and two experts a small step away from it."""
    return {"base": tiny_whisper_folder(0), "es": tiny_whisper_folder(1), "fr": tiny_whisper_folder(2)}


def experts_of(models: dict[str, Path]) -> dict[str, Path]:
    return {name: folder for name, folder in models.items() if name != "base"}


def read(folder: Path) -> dict[str, np.ndarray]:
    checkpoint = Checkpoint(folder)
    return {name: checkpoint.tensor(name).float().numpy() for name in checkpoint.names}


def test_task_arithmetic_and_average_equal_numpy(models, tmp_path):
    base, es, fr = (read(models[name]) for name in ("base", "es", "fr"))
    seen: list[tuple[int, int]] = []
    result = merge_folders(
        models["base"], experts_of(models), tmp_path / "ta", make_recipe("task_arithmetic", scaling=0.3),
        weights={"fr": 2.0},
        on_progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    merge_folders(models["base"], experts_of(models), tmp_path / "mean", "weight_average")
    arithmetic, mean = read(tmp_path / "ta"), read(tmp_path / "mean")
    for name in base:
        expected = base[name] + 0.3 * ((es[name] - base[name]) + 2 * (fr[name] - base[name]))
        assert np.allclose(arithmetic[name], expected, rtol=1e-5, atol=1e-6)
        assert np.allclose(mean[name], (es[name] + fr[name]) / 2, rtol=1e-5, atol=1e-6)
    assert seen[-1] == (result.parameters, result.parameters)
    assert seen == sorted(seen)
    assert result.weights == {"es": 1.0, "fr": 2.0}
    assert result.digest == Checkpoint(tmp_path / "ta").digest()
    assert result.expert_digests["es"] == Checkpoint(models["es"]).digest()
    assert result.retained_energy == {}


def test_lors_equals_pruning_each_expert(models, tmp_path):
    settings = PruneSettings(rank_ratio=0.3, density=0.2, refinements=1)
    recipe = make_recipe("lors", prune=settings, scaling=0.5)
    result = merge_folders(models["base"], experts_of(models), tmp_path / "out", recipe)
    base, es, fr = (Checkpoint(models[name]) for name in ("base", "es", "fr"))
    merged = read(tmp_path / "out")
    deltas = zip(extract(base, es), extract(base, fr), strict=True)
    for (name, one), (_, two) in deltas:
        total = prune_delta(one, settings).dense() + prune_delta(two, settings).dense()
        assert np.allclose(merged[name], base.tensor(name) + 0.5 * total, rtol=1e-5, atol=1e-6)
    assert 0.2 < result.retained_energy["es"] < 1
    card = (tmp_path / "out" / "README.md").read_text()
    assert result.base_digest in card
    assert '"rank_ratio": 0.3' in card


@pytest.mark.parametrize("method", ["task_arithmetic", "weight_average", "linear", "magmax"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_one_expert_at_scaling_one_is_the_expert(tiny_whisper_folder, tmp_path, method, dtype):
    base, expert = tiny_whisper_folder(0, dtype=dtype), Checkpoint(tiny_whisper_folder(1, dtype=dtype))
    merge_folders(base, {"es": expert.folder}, tmp_path / "out", make_recipe(method, scaling=1.0))
    merged = Checkpoint(tmp_path / "out")
    for name in expert.names:
        assert torch.equal(merged.tensor(name), expert.tensor(name))


@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16, "sharded": True}, {"tied": False}], ids=str)
def test_scaling_zero_is_the_base_bit_for_bit(tiny_whisper_folder, tmp_path, options):
    base = Checkpoint(tiny_whisper_folder(0, **options))
    expert = tiny_whisper_folder(1, tied=options.get("tied", True))
    merge_folders(base.folder, {"es": expert}, tmp_path / "out", make_recipe("lors", scaling=0.0), max_shard_bytes=6000)
    merged = Checkpoint(tmp_path / "out")
    assert merged.names == base.names
    assert len(merged.weight_files) > 1
    for name in base.names:
        assert torch.equal(merged.tensor(name).view(torch.uint8), base.tensor(name).view(torch.uint8))


def test_delta_files_give_the_same_bytes_as_folders_in_any_order(models, tmp_path):
    base = Checkpoint(models["base"])
    settings = PruneSettings(composition="sequential", density=0.4)
    files: dict[str, Path] = {}
    for name, folder in experts_of(models).items():
        deltas = prune_task_vector(extract(base, Checkpoint(folder)), settings)
        files[name] = write(tmp_path / f"{name}.safetensors", deltas, base_digest=base.digest(), settings=settings).path
    dense = tmp_path / "dense.safetensors"
    write_dense(dense, extract(base, Checkpoint(models["fr"])), base_digest=base.digest())
    digests = {
        merge_folders(models["base"], experts, tmp_path / f"out{number}", make_recipe("lors", prune=prune)).digest
        for number, (experts, prune) in enumerate(
            [
                (experts_of(models), settings),
                (dict(reversed(experts_of(models).items())), settings),
                (dict(reversed(files.items())), None),
                ({"es": files["es"], "fr": dense}, settings),
                ({"fr": models["fr"], "es": files["es"]}, settings),
            ]
        )
    }
    assert len(digests) == 1
    result = merge_folders(models["base"], files, tmp_path / "again")
    assert result.retained_energy.keys() == {"es", "fr"}


def test_refuses(models, tmp_path, tiny_whisper_folder):
    base, experts, out = models["base"], experts_of(models), tmp_path / "out"
    file = tmp_path / "es.safetensors"
    other = Checkpoint(models["fr"])
    settings = PruneSettings()
    pruned = prune_task_vector(extract(other, Checkpoint(models["es"])), settings)
    write(file, pruned, base_digest=other.digest(), settings=settings)
    for arguments, error, message in [
        ((base, {}, out), InputError, "no expert was given"),
        ((base, {"es": file}, out), CheckpointError, "another base"),
        ((base, {"es": tiny_whisper_folder(d_model=24)}, out), CheckpointError, r"is \[16, 24\] in .* but \[16, 16\]"),
        ((base, {"es": tmp_path / "nothing"}, out), CheckpointError, "is not a folder"),
        ((base, experts, models["fr"]), InputError, "already there and not empty"),
        ((base, experts, file / "out"), InputError, "cannot write"),
    ]:
        with pytest.raises(error, match=message):
            merge_folders(*arguments)
    with pytest.raises(InputError, match="'it' belongs to no expert"):
        merge_folders(base, experts, out, weights={"it": 1.0})
    with pytest.raises(InputError, match="sum to 0"):
        merge_folders(base, experts, out, "weight_average", weights={"es": 1.0, "fr": -1.0})
    with pytest.raises(InputError, match=r"no parameter of .* belongs to the group '\*fc9\*'"):
        merge_folders(base, experts, out, make_recipe("lors", groups={"*fc9*": {"scaling": 1}}))
    recipe = make_recipe("lors", prune=PruneSettings(density=0.5))
    with pytest.raises(InputError, match="was pruned with other settings"):
        merge_folders(models["fr"], {"es": file}, out, recipe, refuse_other_pruning=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["es.safetensors"]


def test_a_base_that_is_not_finite_is_named_where_it_is_left_out(tensor_folder, tmp_path):
    tensors = {"model.encoder.a": torch.tensor([1.0, torch.inf]), "model.decoder.a": torch.ones(2)}
    base = tensor_folder("base", tensors)
    es = tensor_folder("es", {name: torch.zeros(2) for name in tensors})
    recipe = make_recipe("task_arithmetic", groups={"encoder": {"exclude": True}})
    with pytest.raises(CheckpointError, match=r"the tensor model.encoder.a holds NaN or infinity; use a checkpoint"):
        merge_folders(base, {"es": es}, tmp_path / "out", recipe)
