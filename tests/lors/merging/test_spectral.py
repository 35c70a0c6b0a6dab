from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lors.merging.combiners import Fold, Joint
from lors.merging.elementwise import ties
from lors.merging.spectral import iso_c, iso_cts, knots, star, tsv_m

EMPTY = torch.empty(0)


def delta(shape: tuple[int, ...], seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.tensor(np.random.default_rng(seed).normal(size=shape) * scale, dtype=torch.float32)


def merge(how: Fold | Joint, deltas: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    weights = weights or [1.0] * len(deltas)
    base = torch.zeros(deltas[0].shape)
    originals = [each.clone() for each in deltas]
    if isinstance(how, Joint):
        merged = how.combine(deltas, weights, base)
    else:
        state = {name: torch.zeros(base.shape, dtype=torch.float64) for name in how.arrays}
        for each, weight in zip(deltas, weights, strict=True):
            how.add(state, each, weight, 1)
        merged = how.finish(state, weights, base)
    assert all(map(torch.equal, deltas, originals))  # inputs may be mapped files: never written to
    assert merged.shape == base.shape
    assert merged.dtype == torch.float32
    assert merged.is_contiguous()
    return merged


METHODS: dict[str, Callable[[], Fold | Joint]] = {
    "tsv_m": lambda: tsv_m(None),
    "iso_c": iso_c,
    "iso_cts": lambda: iso_cts(0.8),
    "knots": lambda: knots(0.5, "weighted", "weights"),
}
each_method = pytest.mark.parametrize("how", METHODS.values(), ids=METHODS)


def svd(array):
    return np.linalg.svd(array, full_matrices=False)


def polar(array):
    u, _, vh = svd(array)
    return u @ vh


def distance(ours: Tensor, reference) -> float:
    return float(np.linalg.norm(ours.double().numpy() - reference) / max(np.linalg.norm(reference), 1e-300))


def tsv_m_reference(deltas, weights, rank):
    parts = [svd(each) for each in deltas]
    values = np.concatenate([weight * s[:rank] for weight, (_, s, _) in zip(weights, parts, strict=True)])
    left = polar(np.hstack([u[:, :rank] for u, _, _ in parts]))
    return left @ np.diag(values) @ polar(np.vstack([vh[:rank] for _, _, vh in parts]))


def iso_c_reference(deltas, weights):
    u, s, vh = svd(sum(weight * each for weight, each in zip(weights, deltas, strict=True)))
    return s.mean() * u @ vh


def iso_cts_reference(deltas, weights, common):
    k, n = min(deltas[0].shape), len(deltas)
    own = round((k - int(k * common)) / n)
    shared = k - own * n
    u, s, vh = (
        part[..., :shared] if which < 2 else part[:shared]
        for which, part in enumerate(svd(sum(weight * each for weight, each in zip(weights, deltas, strict=True))))
    )
    parts = [svd(weight * (each - u @ (u.T @ each))) for weight, each in zip(weights, deltas, strict=True)]
    mean = np.concatenate([s, *(part[1][:own] for part in parts)]).mean()
    left = polar(np.hstack([u, *(part[0][:, :own] for part in parts)]))
    return mean * left @ polar(np.vstack([vh, *(part[2][:own] for part in parts)]))


def knots_reference(deltas, weights, density):
    """The formulas of the paper, TIES weighted and divided by the weights."""
    u, s, vh = svd(np.hstack(deltas))
    trimmed = []
    for weight, part in zip(weights, np.split(vh, len(deltas), axis=1), strict=True):
        part = s[:, None] * part
        keep = np.argsort(-np.abs(part), axis=None)[: round(density * part.size)]
        flat = np.zeros(part.size)
        flat[keep] = weight * part.flat[keep]
        trimmed.append(flat.reshape(part.shape))
    stack = np.stack(trimmed)
    agrees = (np.sign(stack) == np.sign(stack.sum(axis=0))) & (stack != 0)
    shares = (agrees * np.array(weights)[:, None, None]).sum(axis=0)
    return u @ ((stack * agrees).sum(axis=0) / np.where(shares == 0, 1, shares))


def star_reference(array, eta):
    u, s, vh = svd(array)
    rank = next(r for r in range(1, len(s) + 1) if s[:r].sum() >= eta * s.sum() * (1 - 1e-12))
    return (u[:, :rank] * (s[:rank] * s.sum() / s[:rank].sum())) @ vh[:rank]


sides = st.integers(6, 30)
seeds = st.integers(0, 999)
scales = st.sampled_from([1e-12, 1e-3, 1e6])
weight_lists = st.lists(st.sampled_from([0.25, 1.0, 1.5, -0.5]), min_size=1, max_size=4)


@settings(max_examples=80, deadline=None)
@given(sides, sides, weight_lists, seeds, scales)
def test_the_references(m, n, weights, seed, scale):
    deltas = [delta((m, n), 7 * seed + number, scale) for number in range(len(weights))]
    arrays = [each.double().numpy() for each in deltas]
    k, count = min(m, n), len(deltas)
    assert distance(merge(tsv_m(None), deltas, weights), tsv_m_reference(arrays, weights, k // count)) < 1e-5
    assert distance(merge(iso_c(), deltas, weights), iso_c_reference(arrays, weights)) < 1e-5
    for common in (0.5, 0.8, 1.0):
        expected = iso_cts_reference(arrays, weights, common)
        assert distance(merge(iso_cts(common), deltas, weights), expected) < 1e-5
    assert distance(star(deltas[0], 0.4), star_reference(arrays[0], 0.4)) < 1e-5


@pytest.mark.parametrize("shape", [(8, 12), (12, 8), (40, 10), (9, 9)])  # (40, 10): more rows than all columns together
@pytest.mark.parametrize("density", [0.3, 1.0])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.5, 1.0, 2.0]])
def test_the_reference_of_knots(shape, density, weights):
    for seed in range(5):
        deltas = [delta(shape, 10 * seed + number, 1e-3) for number in range(3)]
        expected = knots_reference([each.double().numpy() for each in deltas], weights, density)
        assert distance(merge(knots(density, "weighted", "weights"), deltas, weights), expected) < 1e-5


@pytest.mark.parametrize("shape", [(9000, 6), (6, 9000)])  # more than one block of the long side
def test_long_sides_are_cut_into_blocks(shape):
    deltas = [delta(shape, number) for number in range(2)]
    arrays, weights = [each.double().numpy() for each in deltas], [1.0, 1.0]
    assert distance(merge(tsv_m(None), deltas), tsv_m_reference(arrays, weights, 3)) < 1e-5
    assert distance(merge(iso_c(), deltas), iso_c_reference(arrays, weights)) < 1e-5
    assert distance(merge(iso_cts(0.5), deltas), iso_cts_reference(arrays, weights, 0.5)) < 1e-5
    assert distance(merge(knots(0.5, "weighted", "weights"), deltas), knots_reference(arrays, weights, 0.5)) < 1e-5


@pytest.mark.parametrize("shape", [(48, 48), (80, 24), (24, 80)])
def test_spectra_that_decay_by_ten_thousand(shape):
    deltas = []
    for number in range(4):
        u, s, vh = svd(delta(shape, number).double().numpy())
        deltas.append(torch.from_numpy((u * np.logspace(0, -4, len(s))) @ vh).float())
    arrays, weights = [each.double().numpy() for each in deltas], [1.0] * 4
    assert distance(merge(tsv_m(None), deltas), tsv_m_reference(arrays, weights, min(shape) // 4)) < 1e-5
    assert distance(merge(iso_c(), deltas), iso_c_reference(arrays, weights)) < 1e-5
    assert distance(merge(iso_cts(0.8), deltas), iso_cts_reference(arrays, weights, 0.8)) < 1e-5
    assert distance(star(deltas[0], 0.9), star_reference(arrays[0], 0.9)) < 1e-5


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(list(METHODS)), sides, sides, st.integers(2, 4), seeds, st.randoms(use_true_random=False))
def test_order_scale_and_transposition(name, m, n, count, seed, random):
    how, deltas = METHODS[name](), [delta((m, n), 7 * seed + number) for number in range(count)]
    weights = [1.0 + number / 4 for number in range(count)]
    merged = merge(how, deltas, weights)
    norm = max(float(torch.linalg.vector_norm(merged)), 1e-30)
    order = random.sample(range(count), count)
    again = merge(how, [deltas[i] for i in order], [weights[i] for i in order])
    assert torch.linalg.vector_norm(again - merged) < 2e-6 * norm
    scaled = merge(how, [each * -64 for each in deltas], weights)
    assert torch.linalg.vector_norm(scaled + 64 * merged) < 2e-6 * 64 * norm
    if name in ("tsv_m", "iso_c"):  # the others treat the two sides of a matrix differently
        turned = merge(how, [each.T.contiguous() for each in deltas], weights)
        assert torch.linalg.vector_norm(turned.T - merged) < 2e-6 * norm


@settings(max_examples=40, deadline=None)
@given(sides, sides, st.integers(1, 5), seeds)
def test_spectra(m, n, count, seed):
    deltas = [delta((m, n), 7 * seed + number) for number in range(count)]
    k = min(m, n)
    total = np.linalg.svd(sum(each.double() for each in deltas).numpy(), compute_uv=False)
    assert np.allclose(np.linalg.svd(merge(iso_c(), deltas).numpy(), compute_uv=False), total.mean(), rtol=1e-5)
    cts = np.linalg.svd(merge(iso_cts(0.8), deltas).numpy(), compute_uv=False)
    assert np.allclose(cts, cts.mean(), rtol=1e-4)
    kept = np.concatenate([np.linalg.svd(each.numpy(), compute_uv=False)[: k // count] for each in deltas])
    spectrum = np.linalg.svd(merge(tsv_m(None), deltas).numpy(), compute_uv=False)
    # U_perp and Vh_perp are orthonormal exactly where the merged singular values are the experts' own.
    assert np.allclose(spectrum, np.pad(np.sort(kept)[::-1], (0, k - len(kept))), rtol=1e-4, atol=1e-4)
    for eta in (0.1, 0.4, 0.9, 1.0):
        own = np.linalg.svd(star(deltas[0], eta).numpy(), compute_uv=False)
        assert own.sum() == pytest.approx(np.linalg.svd(deltas[0].numpy(), compute_uv=False).sum(), rel=1e-5)


def test_golden_values():
    one, two = torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 0.0], [0.0, 5.0]])
    assert torch.allclose(merge(tsv_m(None), [one, two]), torch.tensor([[3.0, 0.0], [0.0, 5.0]]))
    assert torch.allclose(merge(iso_c(), [one, two]), torch.tensor([[4.5, 0.0], [0.0, 4.5]]))
    assert torch.allclose(merge(iso_cts(1.0), [one, two]), torch.tensor([[4.5, 0.0], [0.0, 4.5]]))
    assert torch.allclose(merge(iso_cts(0.1), [one, two]), torch.tensor([[4.0, 0.0], [0.0, 4.0]]))
    assert torch.allclose(star(one, 0.4), torch.tensor([[4.0, 0.0], [0.0, 0.0]]))
    assert torch.allclose(star(one, 0.75), torch.tensor([[4.0, 0.0], [0.0, 0.0]]))
    assert torch.allclose(star(one, 0.76), one)
    assert torch.allclose(merge(knots(1.0, "weighted", "count"), [one, two]), torch.tensor([[3.0, 0.0], [0.0, 3.0]]))
    ones = torch.ones(2, 2)  # of rank 1, singular values 2 and 0
    assert torch.allclose(merge(iso_c(), [ones, ones]), ones)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)])
def test_one_expert(shape):
    own = delta(shape)
    assert torch.allclose(merge(tsv_m(None), [own]), own, atol=1e-6)
    assert torch.allclose(merge(tsv_m(None), [own], [0.5]), own / 2, atol=1e-6)
    assert torch.allclose(merge(knots(1.0, "weighted", "weights"), [own]), own, atol=1e-6)
    assert torch.allclose(merge(iso_cts(0.8), [own]), merge(iso_c(), [own]), atol=1e-6)
    assert star(own, 1.0) is own


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (60, 12)])
def test_identical_experts(shape):
    own = delta(shape)
    u, s, vh = svd(own.double().numpy())
    experts = [own, own.clone(), own.clone()]
    assert distance(merge(tsv_m(None), experts), (u[:, :4] * s[:4]) @ vh[:4]) < 1e-5
    assert distance(merge(iso_c(), experts), 3 * s.mean() * u @ vh) < 1e-5
    assert torch.allclose(merge(knots(1.0, "weighted", "weights"), experts), own, atol=1e-6)


@each_method
@pytest.mark.parametrize("shape", [(10, 14), (14, 10), (50, 10)])
def test_an_expert_of_zeros_or_of_weight_zero(how, shape):
    deltas = [delta(shape), delta(shape, 1), torch.zeros(shape)]
    merged = merge(how(), deltas)
    assert merged.isfinite().all()
    assert merged.any()
    assert not merge(how(), [torch.zeros(shape)] * 2).any()
    if how is not METHODS["knots"]:  # whose basis knows no weights
        other = merge(how(), [*deltas[:2], delta(shape, 2)], [1.0, 1.0, 0.0])
        assert torch.allclose(merged, other, atol=2e-6)
    if how is METHODS["tsv_m"]:
        assert distance(merged, tsv_m_reference([d.double().numpy() for d in deltas[:2]], [1, 1], 10 // 3)) < 1e-5


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (24, 24)])
def test_a_null_space_stays_one(shape):
    """Products of low rank in float32, as LoRS makes them: the rounding's own directions are not scaled up."""
    deltas = [delta((shape[0], 3), number) @ delta((3, shape[1]), 10 + number) for number in range(2)]
    u, s, vh = svd(sum(each.double() for each in deltas).numpy())
    expected = s[:6].sum() / min(shape) * u[:, :6] @ vh[:6]
    assert distance(merge(iso_c(), deltas), expected) < 1e-5
    assert np.linalg.matrix_rank(merge(tsv_m(None), deltas).numpy(), tol=1e-4) == 6
    assert np.linalg.matrix_rank(merge(iso_cts(0.8), deltas).numpy(), tol=1e-4) == 6
    assert np.linalg.matrix_rank(star(deltas[0], 0.999).numpy(), tol=1e-4) == 3


@pytest.mark.parametrize("shape", [(10, 16), (16, 10)])
@pytest.mark.parametrize("rank_ratio", [0.1, 0.5, 1.0])
def test_more_directions_than_the_short_side(shape, rank_ratio):
    deltas, weights = [delta(shape, number) for number in range(4)], [1.0, 2.0, 0.5, 1.0]
    expected = tsv_m_reference([each.double().numpy() for each in deltas], weights, round(10 * rank_ratio))
    assert distance(merge(tsv_m(rank_ratio), deltas, weights), expected) < 1e-5


def test_more_experts_than_directions():
    deltas = [delta((3, 4), number) for number in range(5)]
    arrays = [each.double().numpy() for each in deltas]
    assert distance(merge(tsv_m(None), deltas), tsv_m_reference(arrays, [1] * 5, 1)) < 1e-5
    assert distance(merge(iso_cts(0.5), deltas), iso_c_reference(arrays, [1] * 5)) < 1e-5  # no room for their own


@each_method
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (0, 4), (4, 0), (0,), (7,), (), (6, 5, 3), (4, 0, 3)])
def test_other_shapes(how, shape):
    deltas = [delta(shape, number) for number in range(2)]
    merged = merge(how(), deltas, [1.0, 3.0])
    assert merged.isfinite().all()
    if how is not METHODS["knots"] and len(shape) != 2:
        assert torch.allclose(merged, (deltas[0] + 3 * deltas[1]) / 2)
    assert merge(how(), [torch.zeros(shape)] * 2).shape == shape


def test_vectors_and_convolutions_of_knots_and_star():
    vectors = [delta((50,), number) for number in range(3)]
    state = {name: torch.zeros(50, dtype=torch.float64) for name in ties("weighted", "weights").arrays}
    for each in vectors:
        ties("weighted", "weights").add(state, each, 1.0, 1)
    expected = ties("weighted", "weights").finish(state, [1.0] * 3, EMPTY).float()
    assert torch.equal(merge(knots(1.0, "weighted", "weights"), vectors), expected)
    convolutions = [delta((6, 4, 3), number) for number in range(3)]
    flat = [each.reshape(6, 12) for each in convolutions]
    how = knots(0.4, "weighted", "weights")
    assert torch.equal(merge(how, convolutions), merge(how, flat).reshape(6, 4, 3))
    assert torch.equal(star(convolutions[0], 0.5), star(flat[0], 0.5).reshape(6, 4, 3))
    assert star(vectors[0], 0.1) is vectors[0]
    assert not star(torch.zeros(3, 4), 0.4).any()
    assert star(torch.empty(0, 4), 0.4).shape == (0, 4)


@each_method
@pytest.mark.parametrize("shape", [(8, 20), (80, 8)])
def test_deltas_are_read_at_most_twice(how, shape):
    class Counted(list):
        reads = 0

        def __getitem__(self, index):
            Counted.reads += 1
            return super().__getitem__(index)

        def __iter__(self):
            return (self[index] for index in range(len(self)))

    joint = how()
    if isinstance(joint, Joint):
        joint.combine(Counted(delta(shape, number) for number in range(4)), [1.0] * 4, torch.zeros(shape))
        assert 0 < Counted.reads <= 8


def test_iso_c_forgets_what_is_taken_out_again():
    fold, deltas = iso_c(), [delta((12, 9), number) for number in range(3)]
    state = {"sum": torch.zeros(12, 9, dtype=torch.float64)}
    for each, sign in [(deltas[0], 1), (deltas[1], 1), (deltas[2], 1), (deltas[1], -1)]:
        fold.add(state, each, 0.5, sign)
    assert not fold.elementwise
    expected = merge(iso_c(), [deltas[0], deltas[2]], [0.5, 0.5])
    assert torch.equal(fold.finish(state, [0.5, 0.5], EMPTY), expected)
