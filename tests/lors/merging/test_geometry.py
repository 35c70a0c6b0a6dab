from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lors.errors import InputError
from lors.merging.geometry import model_stock, slerp

shapes = st.lists(st.integers(1, 6), min_size=0, max_size=3).map(tuple)
seeds = st.integers(0, 999)
scales = st.sampled_from([1e-20, 1e-3, 1.0, 1e6])


def delta(shape: tuple[int, ...], seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.tensor(np.random.default_rng(seed).normal(size=shape) * scale, dtype=torch.float32)


def array(tensor: Tensor) -> np.ndarray:
    return tensor.double().numpy().reshape(-1)


def slerp_reference(one, two, t):
    cosine = one @ two / np.linalg.norm(one) / np.linalg.norm(two)
    if abs(cosine) > 0.9995:
        return (1 - t) * one + t * two
    angle = np.arccos(cosine)
    return (np.sin((1 - t) * angle) * one + np.sin(t * angle) * two) / np.sin(angle)


def model_stock_reference(deltas):
    pairs = [one @ two / np.linalg.norm(one) / np.linalg.norm(two) for one, two in itertools.combinations(deltas, 2)]
    count, cosine = len(deltas), max(np.mean(pairs), 0)
    return count * cosine / (1 + (count - 1) * cosine) * sum(deltas) / count


@settings(max_examples=100, deadline=None)
@given(shapes, st.floats(0, 1), seeds, scales)
def test_slerp(shape, t, seed, scale):
    base, one, two = (delta(shape, 3 * seed + number, scale) for number in range(3))
    b, x, y = map(array, (base, one, two))
    merged = slerp(t, "deltas").combine([one, two], [1.0, 1.0], base)
    assert merged.shape == base.shape
    assert merged.dtype == torch.float32
    assert np.allclose(array(merged), slerp_reference(x, y, t), rtol=1e-5, atol=1e-5 * scale)
    models = slerp(t, "models").combine([one, two], [2.0, 2.0], base)
    assert np.allclose(array(models) + b, slerp_reference(b + x, b + y, t), rtol=1e-5, atol=1e-5 * scale)
    other = slerp(1 - t, "models").combine([two, one], [1.0, 1.0], base)
    assert torch.allclose(models, other, rtol=1e-5, atol=1e-6 * scale)
    doubled = slerp(t, "models").combine([2 * one, 2 * two], [1.0, 1.0], 2 * base)
    assert torch.equal(doubled, 2 * models)


@pytest.mark.parametrize("space", ["models", "deltas"])
@pytest.mark.parametrize("near", [True, False])
def test_the_ends_of_the_arc_are_the_experts(space, near):
    base, one, two = delta((30, 20)), delta((30, 20), 1, 1e-3 if near else 1), delta((30, 20), 2, 1e-3 if near else 1)
    assert torch.equal(slerp(0, space).combine([one, two], [1, 1], base), one)
    assert torch.equal(slerp(1, space).combine([one, two], [1, 1], base), two)
    assert torch.allclose(slerp(0.3, space).combine([one, one], [1, 1], base), one)


def test_slerp_golden_values_and_the_line():
    x, y = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0])
    half = slerp(0.5, "deltas")
    assert torch.allclose(half.combine([x, y], [1, 1], torch.zeros(2)), torch.full((2,), 2**0.5))
    assert torch.allclose(half.combine([x, -x], [1, 1], torch.zeros(2)), torch.zeros(2))  # opposite: a line
    assert torch.allclose(half.combine([x, torch.zeros(2)], [1, 1], torch.zeros(2)), x / 2)  # no angle: a line
    near = torch.tensor([2.0, 0.02])  # cosine 0.99995
    assert torch.equal(half.combine([x, near], [1, 1], torch.zeros(2)), (x + near) / 2)
    base = torch.tensor([1.0, 1.0], dtype=torch.bfloat16)  # models (3, 1) and (1, 3)
    expected = torch.tensor([4.0, 4.0]) * np.sin(np.arccos(0.6) / 2) / 0.8 - 1
    assert torch.allclose(slerp(0.5, "models").combine([x, y], [1, 1], base), expected.float())
    long = [delta((2**18 + 5,), seed) for seed in range(2)]  # more than one block
    merged = array(half.combine(long, [1, 1], torch.zeros(2**18 + 5)))
    assert np.allclose(merged, slerp_reference(*map(array, long), 0.5), atol=1e-6)
    assert half.combine([torch.empty(0, 3)] * 2, [1, 1], torch.empty(0, 3)).shape == (0, 3)
    assert half.combine([torch.zeros(3)] * 2, [1, 1], torch.zeros(3)).tolist() == [0, 0, 0]


def test_slerp_refuses_what_is_no_pair_of_equals():
    one = torch.ones(2)
    for count in (1, 3):
        with pytest.raises(InputError, match=f"slerp merges two experts, not {count}"):
            slerp(0.5, "models").combine([one] * count, [1.0] * count, one)
    with pytest.raises(InputError, match=r"slerp takes no merge weights \(1, 0.5\)"):
        slerp(0.5, "models").combine([one, one], [1.0, 0.5], one)


@settings(max_examples=100, deadline=None)
@given(shapes, st.integers(2, 5), seeds, scales, st.floats(0, 3), st.randoms(use_true_random=False))
def test_model_stock(shape, count, seed, scale, shared, random):
    common = delta(shape, 99)
    deltas = [(delta(shape, 7 * seed + number) + shared * common) * scale for number in range(count)]
    merged = model_stock().combine(deltas, [1.0] * count, common)
    assert merged.shape == tuple(shape)
    assert merged.dtype == torch.float32
    assert np.allclose(array(merged), model_stock_reference([*map(array, deltas)]), rtol=1e-5, atol=1e-6 * scale)
    again = model_stock().combine(random.sample(deltas, count), [1.0] * count, common)
    assert torch.allclose(again, merged, rtol=1e-6, atol=1e-6 * scale)
    mean = sum(deltas) / count
    assert torch.linalg.vector_norm(merged) <= torch.linalg.vector_norm(mean) * (1 + 1e-6)


def test_model_stock_edges():
    x, y = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 3.0])
    base, merge = torch.ones(2), model_stock().combine
    assert torch.equal(merge([x], [2.0], base), x)  # one expert is itself, whatever its weight
    assert torch.allclose(merge([x, x, x], [1, 1, 1], base), x)  # cosine 1
    assert merge([x, y], [1, 1], base).abs().max() < 1e-15  # cosine 0
    assert not merge([x, -x], [1, 1], base).any()  # below 0: the formula's denominator is 0
    assert not merge([x, torch.tensor([-1.0, 1.0])], [1, 1], base).any()
    assert torch.allclose(merge([x, x, torch.zeros(2)], [1, 1, 1], base), 3 / 5 * 2 / 3 * x)  # cosines 1, 0, 0
    diagonal = torch.tensor([1.0, 1.0])  # cosine 1 / sqrt(2)
    t = 2 * 0.5**0.5 / (1 + 0.5**0.5)
    assert torch.allclose(merge([x, diagonal], [0.5, 0.5], base), t * torch.tensor([1.5, 0.5]))
    assert not merge([torch.zeros(2)] * 2, [1, 1], base).any()
    assert merge([torch.empty(0, 3)] * 2, [1, 1], torch.empty(0, 3)).shape == (0, 3)
    with pytest.raises(InputError, match=r"model_stock takes no merge weights \(1, 2\)"):
        merge([x, y], [1.0, 2.0], base)
