from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lors import low_rank
from lors.low_rank import rank_for, retained_energy, squared_norm, truncated_svd


def matrix(m: int, n: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.from_numpy((np.random.default_rng(seed).normal(size=(m, n)) * scale).astype(np.float32))


@pytest.mark.parametrize(
    ("ratio", "shape", "rank"),
    [(0.1, (512, 2048), 51), (1e-9, (8, 8), 1), (1.0, (3, 7), 3), (0.5, (5, 9), 2), (0.1, (1, 9), 1)],
)
def test_rank_for(ratio, shape, rank):
    assert rank_for(ratio, shape) == rank


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 40), st.floats(0.01, 1), st.integers(0, 99), st.sampled_from([1e-12, 1e-4, 1e3])
)
def test_equals_the_reference_svd(m, n, ratio, seed, scale):
    delta = matrix(m, n, seed, scale)
    rank = rank_for(ratio, (m, n))
    us, vh = truncated_svd(delta, rank)
    assert us.shape == (m, rank)
    assert vh.shape == (rank, n)
    u, s, v = np.linalg.svd(delta.numpy().astype(np.float64), full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ v[:rank]
    norm = np.linalg.norm(delta.double().numpy())
    assert np.linalg.norm((us.double() @ vh.double()).numpy() - best) / norm < 1e-6
    assert np.allclose(torch.linalg.vector_norm(us, dim=0), s[:rank], rtol=1e-4, atol=1e-5 * s[0])
    assert np.isclose(retained_energy(delta, us @ vh), (s[:rank] ** 2).sum() / (s**2).sum(), atol=1e-5)


@pytest.mark.parametrize("route", ["_lapack_eigenvectors", "_torch_eigenvectors"])
@pytest.mark.parametrize("shape", [(300, 64), (64, 300), (20000, 8)])
@pytest.mark.parametrize("rank", [1, 5, 8])  # of 64: both tridiagonal solvers; 20000 rows: more than one block
def test_large_sides_signs_and_orthonormal_rows(monkeypatch, route, shape, rank):
    monkeypatch.setattr(low_rank, "_lapack_eigenvectors", getattr(low_rank, route))
    delta = matrix(*shape)
    us, vh = truncated_svd(delta, rank)
    again = truncated_svd(delta.clone(), rank)
    assert torch.equal(us, again[0])
    assert torch.equal(vh, again[1])
    assert us.is_contiguous()
    assert vh.is_contiguous()
    assert torch.allclose(vh @ vh.T, torch.eye(rank), atol=1e-5)
    norms = torch.linalg.vector_norm(us, dim=0)
    assert (norms[:-1] >= norms[1:]).all()
    short = us / norms if shape[0] <= shape[1] else vh.T
    assert (short.gather(0, short.abs().argmax(0, keepdim=True)) > 0).all()
    assert torch.allclose(norms, torch.linalg.svdvals(delta)[:rank], rtol=1e-5)


@pytest.mark.parametrize("shape", [(96, 200), (200, 96)])
@pytest.mark.parametrize("rank", [1, 9, 60, 96])
def test_the_route_of_a_gpu_gives_the_factors_of_lapack(monkeypatch, shape, rank):
    delta = matrix(*shape)
    delta[:, 0] *= 1e3  # a spectrum over 6 decades of energy
    ours = truncated_svd(delta, rank)
    monkeypatch.setattr(low_rank, "_lapack_eigenvectors", low_rank._torch_eigenvectors)
    theirs = truncated_svd(delta, rank)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.linalg.vector_norm(one - other) < 1e-6 * torch.linalg.vector_norm(one)


@pytest.mark.parametrize("route", ["_lapack_eigenvectors", "_torch_eigenvectors"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (2, 2), (6, 6)])
def test_zeros_and_deficient_rank(monkeypatch, route, shape):
    monkeypatch.setattr(low_rank, "_lapack_eigenvectors", getattr(low_rank, route))
    for rank in {1, min(shape)}:
        us, vh = truncated_svd(torch.zeros(shape), rank)
        assert torch.equal(us @ vh, torch.zeros(shape))
        ones = torch.ones(shape)
        us, vh = truncated_svd(ones, rank)
        assert torch.allclose(us @ vh, ones, atol=1e-6)


def test_retained_energy_of_zeros_and_squared_norm():
    assert retained_energy(torch.zeros(3), torch.zeros(3)) == 1
    assert retained_energy(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 4.0])) == pytest.approx(16 / 25)
    assert squared_norm(torch.full((10,), 3e30)) == pytest.approx(9e61)  # beyond float32
