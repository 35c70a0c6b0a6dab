"""Equality with peft's merging on tensors: the options named here are what `like: peft` stands for."""

from __future__ import annotations

import pytest
import torch

from lors.merging import elementwise as ew
from lors.merging.combiners import Fold
from lors.merging.recipe import Magnitude, Random
from lors.merging.sparsify import sparsify

peft = pytest.importorskip("peft.utils.merge_utils")

SHAPES = [(40, 30), (16, 5, 3), (1, 1), (50,)]
WEIGHTS = [[1.0, 1.0, 1.0], [0.7, 0.2, 1.9], [1.0, -0.5, 0.3], [-1.0, -1.0, -2.0], [1.0, 0.0, 0.5]]
DENSITIES = [0.07, 0.5, 0.999, 1.0]
ELECTIONS = {"total": "unweighted", "frequency": "count"}

pytestmark = [
    pytest.mark.parametrize("shape", SHAPES, ids=str),
    pytest.mark.filterwarnings("ignore:The density 1"),
]


def experts(shape: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(shape, generator=generator) * 1e-2 for _ in range(3)]


def magnitude(density: float) -> Magnitude:
    return Magnitude(density=density, scope="tensor", count="down")


def folded(fold: Fold, deltas: list[torch.Tensor], weights: list[float]) -> torch.Tensor:
    base = torch.zeros_like(deltas[0])
    state = {array: torch.zeros_like(base, dtype=torch.float64) for array in fold.arrays}
    for delta, weight in zip(deltas, weights, strict=True):
        fold.add(state, delta, weight, 1)
    return fold.finish(state, weights, base).float()


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return torch.equal(ours != 0, theirs != 0) and torch.allclose(ours, theirs, rtol=1e-6, atol=1e-6 * 1e-2)


@pytest.fixture
def our_masks(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]):
    """Give peft's draws our masks, one an expert; returns how to prune by them."""

    def prepare(density: float) -> list[torch.Tensor]:
        steps = Random(density=density, seed=3)
        numbers = iter(range(3))

        def bernoulli(probabilities: torch.Tensor) -> torch.Tensor:
            assert bool((probabilities == density).all())
            return (sparsify(torch.ones(shape), steps, f"expert {next(numbers)}", "fc1") != 0).float()

        monkeypatch.setattr(torch, "bernoulli", bernoulli)
        return [sparsify(delta, steps, f"expert {i}", "fc1") for i, delta in enumerate(experts(shape))]

    return prepare


def test_task_arithmetic(shape):
    deltas = experts(shape)
    for weights in WEIGHTS:
        theirs = peft.task_arithmetic(deltas, torch.tensor(weights))
        assert same(folded(ew.weighted_sum(), deltas, weights), theirs)


@pytest.mark.parametrize("density", DENSITIES)
def test_magnitude_prune(shape, density):
    deltas = experts(shape)
    pruned = [sparsify(delta, magnitude(density)) for delta in deltas]
    for ours, delta in zip(pruned, deltas, strict=True):
        assert torch.equal(ours, peft.prune(delta, density, method="magnitude"))
    for weights in WEIGHTS:
        theirs = peft.magnitude_prune(deltas, torch.tensor(weights), density)
        assert same(folded(ew.weighted_sum(), pruned, weights), theirs)


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("method", ELECTIONS)
def test_ties(shape, density, method):
    deltas = experts(shape)
    pruned = [sparsify(delta, magnitude(density)) for delta in deltas]
    for weights in WEIGHTS:
        theirs = peft.ties(deltas, torch.tensor(weights), density, majority_sign_method=method)
        assert same(folded(ew.ties(ELECTIONS[method], "count", "positive"), pruned, weights), theirs)


@pytest.mark.parametrize("method", ELECTIONS)
def test_ties_on_opposite_and_equal_entries(shape, method):
    signs = [torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(i)).float() / 64 for i in range(3)]
    mask = peft.calculate_majority_sign_mask(torch.stack(signs), method=method)
    for weights in WEIGHTS:
        weighted = torch.stack([delta * weight for delta, weight in zip(signs, weights, strict=True)])
        theirs = peft.disjoint_merge(weighted, mask)
        assert same(folded(ew.ties(ELECTIONS[method], "count", "positive"), signs, weights), theirs)


@pytest.mark.parametrize("density", DENSITIES)
def test_dare_linear(shape, density, our_masks):
    for weights in WEIGHTS:
        pruned = our_masks(density)
        theirs = peft.dare_linear(experts(shape), torch.tensor(weights), density)
        assert same(folded(ew.weighted_sum(), pruned, weights), theirs)


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("method", ELECTIONS)
def test_dare_ties(shape, density, method, our_masks):
    for weights in WEIGHTS:
        pruned = our_masks(density)
        theirs = peft.dare_ties(experts(shape), torch.tensor(weights), density, majority_sign_method=method)
        assert same(folded(ew.ties(ELECTIONS[method], "count", "positive"), pruned, weights), theirs)
