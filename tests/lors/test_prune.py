from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from lors.blocks import row_blocks
from lors.errors import CheckpointError
from lors.low_rank import rank_for, retained_energy
from lors.prune import COMPOSITIONS, DTYPES, PrunedDelta, PruneSettings, prune_delta, prune_task_vector
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
    indices = pruned.indices.unpacked().long() if pruned.indices else torch.empty(0, dtype=torch.long)
    if composition in {"additive", "sparse"}:
        assert len(indices) == count
    kept = torch.zeros(delta.numel(), dtype=torch.bool)
    if composition == "additive":
        kept[indices] = True
        assert torch.allclose(dense[kept], flat[kept], rtol=1e-6, atol=1e-9)
    if composition == "sparse":
        kept[indices] = True
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


@settings(max_examples=30)
@example(10, 16, 0.125, 0.05078125, 77)
@given(st.integers(2, 24), st.integers(2, 24), st.floats(0.05, 0.6), st.floats(0.05, 0.6), st.integers(0, 99))
def test_each_part_more_lowers_the_error(m, n, rank_ratio, density, seed):
    delta = random(m, n, seed=seed) + torch.where(random(m, n, seed=seed + 1) > 0.0015, 0.05, 0.0)  # with spikes

    def error(**options):
        return prune_delta(delta, PruneSettings(rank_ratio=rank_ratio, density=density, **options)).error

    slack = torch.finfo(torch.float32).eps * float(delta.square().sum())  # once it is converged, rounding is left
    alone = error(composition="low_rank")
    errors = [error(refinements=k) for k in (0, 1, 3, 10)]
    for more, less in zip(errors, [alone, *errors], strict=False):
        assert more <= less + slack


def test_refining_finds_what_spikes_hide():
    delta = random(24, 24) + torch.where(random(24, 24, seed=1) > 0.0015, 0.05, 0.0)  # spikes that bend the first SVD
    kept = [prune_delta(delta, PruneSettings(refinements=k)).retained_energy for k in (0, 10)]
    assert kept[1] > kept[0] + 0.01


@pytest.mark.parametrize("composition", COMPOSITIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(700, 900), (40, 8, 3), (1, 5), (7,), ()])
def test_rows_and_energies_are_of_what_is_stored(composition, dtype, shape):
    delta = random(*shape)
    pruned = prune_delta(delta, PruneSettings(composition=composition), dtype=dtype)
    dense = pruned.dense()
    blocks = [pruned.rows(start, stop) for start, stop in row_blocks(shape)]
    assert len(blocks) == {700: 3}.get(shape[0] if shape else 1, 1)
    assert torch.equal(torch.cat(blocks).reshape(shape), dense)
    assert pruned.rows(0, 1).shape == (1, *shape[1:])
    assert dense.dtype == torch.float32
    assert pruned.error == pytest.approx(float((delta - dense).double().square().sum()), rel=1e-5, abs=1e-18)
    exact = prune_delta(delta, PruneSettings(composition=composition))
    assert pruned.error == pytest.approx(exact.error, abs=1e-3 * exact.energy)
    if dtype != "float32":
        assert all(part.itemsize <= 2 for name, part in pruned.parts().items() if name not in {"scale", "counts"})


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
def test_the_sparse_part_makes_up_for_the_rounding_of_the_factors(dtype):
    delta = random(60, 80)
    pruned = prune_delta(delta, PruneSettings(density=1), dtype=dtype)
    rounded = prune_delta(delta, PruneSettings(composition="low_rank", rank_ratio=1), dtype=dtype)
    assert pruned.error < 1e-4 * pruned.energy
    full = prune_delta(delta, PruneSettings(rank_ratio=1, density=1), dtype=dtype)
    assert full.error < 1e-2 * rounded.error


def test_sequential_is_a_threshold_that_no_rounding_can_cross():
    delta = random(64, 200)
    pruned = prune_delta(delta, PruneSettings(composition="sequential"), dtype="bfloat16")
    us, vh = (factor.double().numpy() for factor in pruned.factors())
    assert set(pruned.parts()) == {"us", "vh"}
    assert pruned.count == 1280
    exact = [[sum(Fraction(a) * Fraction(b) for a, b in zip(u, v, strict=True)) for v in vh.T] for u in us[:8]]
    product = np.abs(us @ vh)
    kept = product >= pruned.threshold
    assert kept.sum() == 1280
    assert all(
        (abs(e) >= Fraction(pruned.threshold)) == k
        for row, keep in zip(exact, kept, strict=False)
        for e, k in zip(row, keep, strict=True)
    )
    last, first = product[kept].min(), product[~kept].max()
    assert pruned.threshold == pytest.approx((last + first) / 2, rel=1e-12)
    assert torch.equal(pruned.dense() != 0, torch.from_numpy(kept))
    with pytest.raises(CheckpointError, match="its threshold keeps 1280 entries, not the 1281"):
        replace(pruned, count=1281).dense()


def test_sequential_stores_the_entries_where_they_tie():
    delta = torch.ones(6, 10)
    pruned = prune_delta(delta, PruneSettings(composition="sequential", density=0.25))
    assert pruned.us is None
    assert pruned.threshold is None
    assert pruned.indices.unpacked().tolist() == list(range(15))  # the lowest indices first
    assert torch.allclose(pruned.dense().reshape(-1)[:15], torch.ones(15), atol=1e-6)
    plan = dict(prune_task_vector([("a", delta)], PruneSettings(composition="sequential"), "int8", {"a": (1, 15)}))
    assert plan["a"].count == 60  # a planned count gives way to its ties, which cost nothing
    assert set(plan["a"].parts()) == {"us", "vh", "scale"}
    rows = torch.zeros(6, 10)
    rows[2] = random(10)
    few = prune_delta(rows, PruneSettings(composition="sequential", density=0.5))  # of 10 that are not zero
    assert few.count == 10
    assert torch.allclose(few.dense(), rows, atol=1e-9)


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
    s = PruneSettings(include=("model.*",), exclude=("embeddings", "*.bias"), vectors="drop")
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
    assert set(pruned["model.fc1.weight"].parts()) == {"us", "vh", "positions", "counts", "values"}


def test_groups_have_their_own_ratios():
    s = PruneSettings(
        rank_ratio=0.5,
        density=0.2,
        groups={"decoder": {"rank_ratio": 0.25}, "*.fc1.*": {"density": 0.4}, "embeddings": {"rank_ratio": 1}},
    )
    of = {
        "model.encoder.fc2.weight": (0.5, 0.2),
        "model.encoder.fc1.weight": (0.5, 0.4),
        "model.decoder.fc1.weight": (0.25, 0.4),
        "model.decoder.embed_tokens.weight": (1, 0.2),  # the last one written wins
    }
    pruned = dict(prune_task_vector([(name, random(20, 40)) for name in of], s))
    for name, (rank_ratio, density) in of.items():
        assert s.of(name, (20, 40)) == (rank_ratio, density)
        assert pruned[name].us.shape == (20, 20 * rank_ratio)
        assert pruned[name].indices.count == 800 * density
    assert PruneSettings(**s.model_dump()) == s


def test_a_plan_says_ranks_and_counts():
    deltas = {name: random(8, 10) for name in ("a", "b", "c", "d")} | {"bias": random(4)}
    plan = {"a": (2, 5), "b": (0, 3), "c": (0, 0)}
    pruned = dict(prune_task_vector(deltas.items(), PruneSettings(), "bfloat16", plan))
    assert {name: set(part.parts()) & {"us", "values", "whole"} for name, part in pruned.items()} == {
        "a": {"us", "values"}, "b": {"values"}, "c": set(), "d": {"whole"}, "bias": {"whole"},
    }  # fmt: skip
    assert pruned["a"].us.shape == (8, 2)
    assert pruned["a"].indices.count == 5
    assert pruned["c"].retained_energy == 0


def test_refuses_what_does_not_fit_the_dtype():
    with pytest.raises(CheckpointError, match="the delta of fc1 is too large for float16; store it as bfloat16"):
        prune_delta(torch.full((4, 4), 1e6), PruneSettings(), "fc1", "float16")


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
        {"groups": {"encoder": {"rank_ratio": 0}}},
        {"groups": {"encoder": {"density": 1.5}}},
        {"groups": {"encoder": {"scaling": 1}}},
    ],
)
def test_settings_refuse(options):
    with pytest.raises(ValidationError):
        PruneSettings(**options)


def test_settings_are_frozen_and_a_delta_of_nothing_is_zero():
    with pytest.raises(ValidationError, match="frozen"):
        PruneSettings().density = 0.5
    assert torch.equal(PrunedDelta((2, 3)).dense(), torch.zeros(2, 3))
