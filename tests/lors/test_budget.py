from __future__ import annotations

import numpy as np
import pytest
import torch

from lors.budget import fit_budget
from lors.delta_file import write
from lors.errors import InputError
from lors.prune import COMPOSITIONS, DTYPES, PruneSettings, prune_task_vector
from lors.prune_settings import parse_size


@pytest.fixture(scope="module")
def deltas():
    """Matrices of unlike spectra and energies, with spikes, a convolution, a bias and a matrix of zeros."""
    rng = np.random.default_rng(0)
    found = {"bias": rng.normal(0, 1e-4, 300), "zeros": np.zeros((64, 64))}
    for number, (m, n) in enumerate([(128, 128), (128, 512), (512, 128), (4000, 128)]):
        spectrum = np.arange(1, 129) ** (-0.3 - 0.3 * number)
        found[f"layers.{number}.weight"] = (
            rng.normal(size=(m, 128)) * spectrum @ rng.normal(size=(128, n)) * 1e-4 * 3.0**-number
            + (rng.random((m, n)) > 0.995) * 2e-3
        )
    found["conv.weight"] = rng.normal(0, 1e-4, (128, 20, 3))
    return {name: torch.from_numpy(delta.astype(np.float32)) for name, delta in found.items()}


def pruned_file(path, deltas, settings, dtype, plan=None):
    pruned = prune_task_vector(deltas.items(), settings, dtype, plan)
    return write(path, pruned, base_digest="b" * 64, settings=settings)


@pytest.mark.parametrize("composition", COMPOSITIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("budget", [150_000, 300_000, 900_000])
def test_the_file_fills_the_budget_and_no_more(deltas, tmp_path, composition, dtype, budget):
    settings = PruneSettings(composition=composition)
    plan = fit_budget(deltas.items(), budget, settings, dtype)
    file = pruned_file(tmp_path / "a.safetensors", deltas, settings, dtype, plan)
    assert file.path.stat().st_size <= budget
    # 4 kB are left for the caller's provenance. With (nearly) every direction there is no more to store.
    sides = {name: min(delta.shape[0], delta[0].numel()) for name, delta in deltas.items()}
    full = all(rank > 0.95 * sides[name] for name, (rank, _) in plan.items() if name != "zeros")
    assert file.path.stat().st_size >= 0.97 * budget - 4096 or (full and composition in {"low_rank", "sequential"})
    assert plan == fit_budget(deltas.items(), budget, settings, dtype)


@pytest.mark.parametrize("composition", ["additive", "low_rank", "sparse"])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_retains_more_than_one_ratio_for_all(deltas, tmp_path, composition, dtype):
    for ratio in (0.03, 0.1, 0.3):
        settings = PruneSettings(composition=composition, rank_ratio=ratio, density=ratio)
        uniform = pruned_file(tmp_path / "uniform.safetensors", deltas, settings, dtype)
        size = uniform.path.stat().st_size + 4096  # what is left for provenance
        plan = fit_budget(deltas.items(), size, settings, dtype)
        fitted = pruned_file(tmp_path / "fitted.safetensors", deltas, settings, dtype, plan)
        assert fitted.retained_energy > uniform.retained_energy


def test_more_room_retains_more_until_all_is_whole(deltas, tmp_path):
    settings, kept = PruneSettings(), []
    for budget in (50_000, 100_000, 300_000, 1_000_000, 3_000_000):
        plan = fit_budget(deltas.items(), budget, settings, "bfloat16")
        kept.append(pruned_file(tmp_path / "a.safetensors", deltas, settings, "bfloat16", plan).retained_energy)
    assert kept == sorted(kept)
    assert plan == {}
    assert kept[-1] > 1 - 1e-5


def test_excluded_tensors_and_vectors_are_not_in_the_plan(deltas):
    settings = PruneSettings(exclude=("layers.0.*",), vectors="drop")
    assert fit_budget(deltas.items(), 200_000, settings).keys() == deltas.keys() - {"bias", "layers.0.weight"}


def test_nothing_but_zeros_and_progress():
    done = []
    deltas = {"a": torch.zeros(8, 9), "b": torch.zeros(3)}
    assert fit_budget(deltas.items(), 10_000, PruneSettings(), on_progress=done.append) == {"a": (0, 0)}
    assert done == [72, 75]


def test_refuses_too_small_a_budget_with_the_least_size(deltas):
    with pytest.raises(InputError, match=r"a budget of 5000 bytes .* give at least \d+ bytes") as refused:
        fit_budget(deltas.items(), 5000, PruneSettings())
    least = int(str(refused.value).split("at least ")[1].split()[0])
    assert fit_budget(deltas.items(), least, PruneSettings())
    with pytest.raises(InputError, match="give at least"):
        fit_budget(deltas.items(), least - 1, PruneSettings())


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("20MB", 20_000_000),
        ("20 MiB", 20 * 2**20),
        ("1.5kB", 1500),
        ("7", 7),
        ("7B", 7),
        ("2gib", 2**31),
        ("3KB", 3000),
    ],
)
def test_parse_size(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "20 apples", "-5MB", "0MB", "1e6", "nan"])
def test_parse_size_refuses(text):
    with pytest.raises(InputError, match=r"write 20MB"):
        parse_size(text)
