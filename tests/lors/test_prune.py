from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from lors.errors import CheckpointError
from lors.low_rank import rank_for, retained_energy
from lors.prune import COMPOSITIONS, PrunedDelta, PruneSettings, prune_delta, prune_task_vector
from lors.sparse import count_for


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, 1e-3, shape).astype(np.float32))


def reference_svd(delta: np.ndarray, rank: int) -> np.ndarray:
    u, s, vh = np.linalg.svd(delta, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def reference_top(delta: np.ndarray, count: int) -> np.ndarray:
    kept = np.zeros(delta.size)
    order = np.argsort(-np.abs(delta).reshape(-1), kind="stable")[:count]
    kept[order] = delta.reshape(-1)[order]
    return kept.reshape(delta.shape)


def reference(delta: np.ndarray, s: PruneSettings) -> np.ndarray:
    """LoRS in float64, by the book."""
    d = delta.astype(np.float64).reshape(delta.shape[0], -1)
    rank, count = rank_for(s.rank_ratio, d.shape), count_for(s.density, d.size)
    low = reference_svd(d, rank)
    if s.composition == "sparse":
        out = reference_top(d, count)
    elif s.composition == "low_rank":
        out = low
    elif s.composition == "sequential":
        out = reference_top(low, count)
    else:
        sparse = reference_top(d - low, count)
        for _ in range(s.refinements):
            low = reference_svd(d - sparse, rank)
            sparse = reference_top(d - low, count)
        out = low + sparse
    return out.reshape(delta.shape)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (8, 5, 3), (1, 9), (9, 1), (1, 1), (4, 2, 3, 2)])
@pytest.mark.parametrize(
    "options",
    [{"composition": name} for name in COMPOSITIONS] + [{"refinements": 1}, {"refinements": 4}],
    ids=str,
)
@pytest.mark.parametrize(("rank_ratio", "density"), [(0.1, 0.1), (0.5, 0.3), (1.0, 1.0), (1e-6, 1e-6)])
def test_equals_the_reference(shape, options, rank_ratio, density):
    s = PruneSettings(rank_ratio=rank_ratio, density=density, **options)
    delta = random(*shape)
    pruned = prune_delta(delta, s)
    dense = pruned.dense()
    assert dense.shape == delta.shape
    if s.composition == "additive" and rank_ratio == 1:
        assert np.allclose(dense, delta, atol=1e-8)  # the residual is rounding: which entries S takes is arbitrary
    else:
        assert np.allclose(dense, reference(delta.numpy(), s), atol=2e-8)
    assert pruned.retained_energy == pytest.approx(retained_energy(delta, dense), abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(COMPOSITIONS),
    st.lists(st.integers(1, 12), min_size=2, max_size=3),
    st.floats(0.01, 1),
    st.floats(0.01, 1),
    st.integers(0, 99),
)
def test_invariants(composition, shape, rank_ratio, density, seed):
    delta = random(*shape, seed=seed)
    pruned = prune_delta(delta, PruneSettings(composition=composition, rank_ratio=rank_ratio, density=density))
    m, n = shape[0], delta.numel() // shape[0]
    count = count_for(density, delta.numel())
    dense, flat = pruned.dense().reshape(-1), delta.reshape(-1)
    assert pruned.whole is None
    if composition in {"additive", "low_rank"}:
        assert pruned.us.shape == (m, rank_for(rank_ratio, (m, n)))
        assert pruned.vh.shape == (rank_for(rank_ratio, (m, n)), n)
    if composition != "low_rank":
        assert pruned.indices.numel() == pruned.values.numel() == count
        assert (pruned.indices.diff() > 0).all()
    kept = torch.zeros(delta.numel(), dtype=torch.bool)
    if composition == "additive":
        kept[pruned.indices.long()] = True
        assert torch.allclose(dense[kept], flat[kept], rtol=1e-6, atol=1e-9)
    if composition == "sparse":
        kept[pruned.indices.long()] = True
        assert torch.equal(dense[kept], flat[kept])
        assert not dense[~kept].any()
    if composition == "sequential":
        assert (dense != 0).sum() == count
    assert -1e-6 <= pruned.retained_energy <= 1 + 1e-6


@pytest.mark.parametrize("shape", [(12, 20), (6, 4, 3)])
def test_edges_that_lose_nothing(shape):
    delta = random(*shape)
    assert torch.equal(prune_delta(delta, PruneSettings(composition="sparse", density=1)).dense(), delta)
    additive = prune_delta(delta, PruneSettings(density=1))
    assert torch.allclose(additive.dense(), delta, rtol=1e-6, atol=1e-9)
    assert additive.retained_energy == pytest.approx(1)
    full = prune_delta(delta, PruneSettings(composition="low_rank", rank_ratio=1)).dense()
    assert (full - delta).norm() < 1e-5 * delta.norm()


def test_refining_does_not_lose_energy():
    delta = random(24, 24) + torch.where(random(24, 24, seed=1) > 0.0015, 0.05, 0.0)  # spikes that bend the first SVD
    kept = [prune_delta(delta, PruneSettings(refinements=k)).retained_energy for k in (0, 1, 3, 10)]
    assert kept == sorted(kept)
    assert kept[-1] > kept[0] + 0.01


@pytest.mark.parametrize("composition", COMPOSITIONS)
def test_zeros_empty_and_vectors(composition):
    s = PruneSettings(composition=composition)
    for shape in [(5, 7), (1, 1), (2, 3, 4)]:
        zero = prune_delta(torch.zeros(shape), s)
        assert torch.equal(zero.dense(), torch.zeros(shape))
        assert zero.retained_energy == 1
    for shape in [(0,), (0, 3), (3, 0)]:
        assert prune_delta(torch.empty(shape), s).dense().shape == shape
    bias = random(6)
    assert prune_delta(bias, s).whole is bias
    dropped = prune_delta(bias, s.model_copy(update={"vectors": "drop"}))
    assert dropped.parts() == {}
    assert torch.equal(dropped.dense(), torch.zeros(6))
    assert dropped.retained_energy == 0
    assert prune_delta(torch.tensor(3.0), s).dense().item() == 3


def test_include_and_exclude_leave_whole():
    s = PruneSettings(include=("model.*",), exclude=("*.embed_*", "*.bias"), vectors="drop")
    deltas = {
        name: random(*shape)
        for name, shape in {
            "model.fc1.weight": (8, 8),
            "model.fc1.bias": (8,),
            "model.norm.weight": (8,),
            "model.embed_tokens.weight": (8, 8),
            "proj_out.weight": (8, 8),
        }.items()
    }
    pruned = dict(prune_task_vector(deltas.items(), s))
    assert list(pruned) == list(deltas)
    whole = {name for name, part in pruned.items() if part.whole is not None}
    assert whole == {"model.fc1.bias", "model.embed_tokens.weight", "proj_out.weight"}
    assert pruned["model.norm.weight"].parts() == {}
    assert set(pruned["model.fc1.weight"].parts()) == {"us", "vh", "indices", "values"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_refuses_what_is_not_finite(value):
    delta = random(4, 4)
    delta[1, 1] = value
    with pytest.raises(CheckpointError, match="the delta of fc1 holds NaN"):
        prune_delta(delta, PruneSettings(), "fc1")


@pytest.mark.parametrize(
    "options",
    [
        {"rank_ratio": 0},
        {"rank_ratio": 1.01},
        {"rank_ratio": float("nan")},
        {"density": 0},
        {"density": -0.1},
        {"refinements": -1},
        {"composition": "sparse", "refinements": 1},
        {"composition": "sum"},
        {"vectors": "some"},
        {"ratio": 0.1},
    ],
)
def test_settings_refuse(options):
    with pytest.raises(ValidationError):
        PruneSettings(**options)


def test_settings_are_frozen_and_a_delta_of_nothing_is_zero():
    with pytest.raises(ValidationError, match="frozen"):
        PruneSettings().density = 0.5
    assert torch.equal(PrunedDelta((2, 3)).dense(), torch.zeros(2, 3))
