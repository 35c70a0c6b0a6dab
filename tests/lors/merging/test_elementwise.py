from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lors.errors import InputError
from lors.merging import elementwise as ew
from lors.merging.combiners import Fold

ELECTIONS, DIVISORS = ["unweighted", "weighted", "count"], ["count", "weights", "none"]
FOLDS = {
    "sum": ew.weighted_sum(),
    "mean": ew.linear(True),
    "linear": ew.linear(False),
    "magmax": ew.magmax(),
    **{f"ties {e} {d} {t}": ew.ties(e, d, t) for e in ELECTIONS for d in DIVISORS for t in ("drop", "positive")},
}
REMOVABLE = {name: fold for name, fold in FOLDS.items() if fold.removable}
BASE = torch.tensor([[0.5, -1.0, 2.0, 0.25], [3.0, 0.0, -0.125, 1.0]], dtype=torch.float64)


def whole(low: int, high: int) -> st.SearchStrategy[list[list[int]]]:
    return st.lists(st.lists(st.integers(low, high), min_size=8, max_size=8), min_size=1, max_size=5)


# Multiples of 2^-10: float32 numbers whose sums are exact. Many zeros, equals and opposites among the small ones.
DELTAS = st.one_of(whole(-2, 2), whole(-(2**23), 2**23)).map(
    lambda rows: [torch.tensor(row, dtype=torch.float32).reshape(2, 4) / 1024 for row in rows]
)
POWERS = st.lists(st.sampled_from([1.0, 0.5, -2.0, 0.25, -1.0, 4.0]), min_size=5, max_size=5)
WEIGHTS = st.lists(st.floats(0.1, 3) | st.floats(-3, -0.1), min_size=5, max_size=5)


def state_of(fold: Fold, shape: Sequence[int]) -> dict[str, torch.Tensor]:
    return {array: torch.zeros(tuple(shape), dtype=torch.float64) for array in fold.arrays}


def folded(fold: Fold, deltas: list[torch.Tensor], weights: list[float], base: torch.Tensor = BASE) -> torch.Tensor:
    state = state_of(fold, base.shape)
    for delta, weight in zip(deltas, weights, strict=True):
        fold.add(state, delta, weight, 1)
    return fold.finish(state, weights, base)


def reference_ties(
    deltas: np.ndarray, weights: np.ndarray, election: str, divisor: str, tie: str
) -> np.ndarray:  # deltas (experts, ...) float64
    weighted = deltas * weights.reshape(-1, *[1] * (deltas.ndim - 1))
    voters = weighted if election == "weighted" else deltas
    votes = (np.sign(voters) if election == "count" else voters).sum(0)
    out = np.zeros(votes.shape)
    for index in np.ndindex(votes.shape):
        sign = np.sign(votes[index]) or {"drop": 0, "positive": 1, "negative": -1}[tie]
        agree = [i for i in range(len(deltas)) if sign and np.sign(voters[(i, *index)]) == sign]
        share = {"count": len(agree), "weights": sum(weights[i] for i in agree), "none": 1}[divisor]
        out[index] = sum(weighted[(i, *index)] for i in agree) / (share if abs(share) > 1e-9 else 1)
    return out


@settings(max_examples=60)
@given(DELTAS, POWERS, st.sampled_from(ELECTIONS), st.sampled_from(DIVISORS), st.data())
def test_ties_equals_the_reference(deltas, weights, election, divisor, data):
    tie = data.draw(st.sampled_from(["drop", "positive", "negative"]))
    weights = weights[: len(deltas)]
    expected = reference_ties(
        np.stack([delta.double().numpy() for delta in deltas]), np.array(weights), election, divisor, tie
    )
    merged = folded(ew.ties(election, divisor, tie), deltas, weights)
    assert np.allclose(merged, expected, rtol=1e-12, atol=1e-15)
    assert np.array_equal(merged.numpy() != 0, expected != 0)


def test_ties_by_hand():
    deltas = [
        torch.tensor([4.0, 4, 1, 0, 2, 0]),
        torch.tensor([2.0, -1, -1, 0, -2, 0]),
        torch.tensor([0, -1.0, 0, 0, 0, 5]),
    ]
    ones = [1.0, 1.0, 1.0]
    base = torch.zeros(6)
    assert folded(ew.ties("weighted", "count"), deltas, ones, base).tolist() == [3, 4, 0, 0, 0, 5]
    assert folded(ew.ties("weighted", "count", "positive"), deltas, ones, base).tolist() == [3, 4, 1, 0, 2, 5]
    assert folded(ew.ties("weighted", "count", "negative"), deltas, ones, base).tolist() == [3, 4, -1, 0, -2, 5]
    assert folded(ew.ties("count", "none"), deltas, ones, base).tolist() == [6, -2, 0, 0, 0, 5]
    # An expert of weight -1 turns round: weighted, it also votes and sides with the others' opposite.
    turned = [1.0, -1.0, 1.0]
    assert folded(ew.ties("weighted", "none"), deltas, turned, base).tolist() == [4, 5, 2, 0, 4, 5]
    assert folded(ew.ties("unweighted", "none"), deltas, turned, base).tolist() == [2, 4, 0, 0, 0, 5]
    assert folded(ew.ties("weighted", "weights"), deltas, [3.0, 1.0, 1.0], base).tolist() == [3.5, 4, 1, 0, 2, 5]


def test_ties_holds_no_more_arrays_than_its_options_need():
    sizes = {(e, d): len(ew.ties(e, d).arrays) for e in ELECTIONS for d in DIVISORS}
    assert sizes == {
        ("unweighted", "count"): 5,
        ("unweighted", "weights"): 5,
        ("unweighted", "none"): 3,
        ("weighted", "count"): 4,
        ("weighted", "weights"): 4,
        ("weighted", "none"): 2,
        ("count", "count"): 4,
        ("count", "weights"): 5,
        ("count", "none"): 3,
    }


@settings(max_examples=60)
@given(DELTAS, WEIGHTS)
def test_sums_equal_numpy(deltas, weights):
    weights = weights[: len(deltas)]
    weighted = sum(weight * delta.double().numpy() for weight, delta in zip(weights, deltas, strict=True))
    assert np.allclose(folded(ew.weighted_sum(), deltas, weights), weighted, rtol=1e-12, atol=1e-10)
    if abs(sum(weights)) > 0.01:
        assert np.allclose(folded(ew.linear(True), deltas, weights), weighted / sum(weights), rtol=1e-12, atol=1e-8)
    models = sum(w * (BASE.numpy() + d.double().numpy()) for w, d in zip(weights, deltas, strict=True))
    assert np.allclose(BASE + folded(ew.linear(False), deltas, weights), models, rtol=1e-12, atol=1e-10)


def test_a_mean_refuses_weights_that_cancel_out():
    with pytest.raises(InputError, match="weights sum to 0"):
        folded(ew.linear(True), [BASE, BASE], [1.0, -1.0])


@settings(max_examples=60)
@given(DELTAS, POWERS)
def test_magmax_equals_numpy(deltas, weights):
    weights = weights[: len(deltas)]
    stack = np.stack([weight * delta.double().numpy() for weight, delta in zip(weights, deltas, strict=True)])
    merged = folded(ew.magmax(), deltas, weights).numpy()
    assert np.array_equal(np.abs(merged), np.abs(stack).max(0))
    positive = (stack == np.abs(merged)).any(0)  # of two equal magnitudes the positive
    assert np.array_equal(merged > 0, positive & (merged != 0))


@settings(max_examples=60)
@given(DELTAS, POWERS, st.sampled_from([0.25, 0.4, 1.0, 2.0]), st.integers(1, 6))
def test_consensus_equals_numpy(deltas, weights, threshold, agreement):
    weights = weights[: len(deltas)]
    stack = np.stack([weight * delta.double().numpy() for weight, delta in zip(weights, deltas, strict=True)])
    held = (np.abs(stack) >= threshold * np.abs(stack.sum(0) - stack)).sum(0)
    expected = np.where(held >= min(agreement, len(deltas)), stack.sum(0), 0)
    joint = ew.consensus(threshold, agreement)
    assert joint.elementwise
    merged = joint.combine(deltas, weights, BASE)
    assert np.array_equal(merged, expected)
    rows = [joint.combine([delta[i] for delta in deltas], weights, BASE[i]) for i in range(2)]
    assert torch.equal(torch.stack(rows), merged)


def test_consensus_by_hand():
    deltas = [torch.tensor([1.0, 1, 1]), torch.tensor([1.0, 0, -5]), torch.tensor([1.0, 0, 5])]
    base = torch.zeros(3)  # shared by all, by one, and lost by the first among the others
    assert ew.consensus(0.4, 2).combine(deltas, [1.0] * 3, base).tolist() == [3, 0, 1]
    assert ew.consensus(0.4, 1).combine(deltas, [1.0] * 3, base).tolist() == [3, 1, 1]
    assert ew.consensus(0.4, 3).combine(deltas, [1.0] * 3, base).tolist() == [3, 0, 1]
    assert ew.consensus(0.6, 2).combine(deltas, [1.0] * 3, base).tolist() == [0, 0, 1]


@pytest.mark.parametrize("name", FOLDS)
@settings(max_examples=10)
@given(deltas=DELTAS, weights=POWERS, data=st.data())
def test_order_and_blocks_leave_no_trace(name, deltas, weights, data):
    fold, weights = FOLDS[name], weights[: len(deltas)]
    if name == "mean" and sum(weights) == 0:
        weights[0] += 8
    merged = folded(fold, deltas, weights)
    order = data.draw(st.permutations(range(len(deltas))))
    assert torch.equal(folded(fold, [deltas[i] for i in order], [weights[i] for i in order]), merged)
    rows = [folded(fold, [delta[i : i + 1] for delta in deltas], weights, BASE[i : i + 1]) for i in range(2)]
    assert torch.equal(torch.cat(rows), merged)


@pytest.mark.parametrize("name", REMOVABLE)
@settings(max_examples=10)
@given(deltas=DELTAS, powers=POWERS, weights=WEIGHTS, gone=st.integers(0, 4))
def test_removing_undoes_adding(name, deltas, powers, weights, gone):
    fold, gone = FOLDS[name], gone % len(deltas)
    for each, exact in ((powers, True), (weights, False)):
        state, without = state_of(fold, BASE.shape), state_of(fold, BASE.shape)
        for number, delta in enumerate(deltas):
            fold.add(state, delta, each[number], 1)
            if number != gone:
                fold.add(without, delta, each[number], 1)
        held = {array: torch.stack([delta.abs().double() for delta in deltas]).sum(0) * 4 + 20 for array in state}
        fold.add(state, deltas[gone], each[gone], -1)
        for array in fold.arrays:
            assert torch.equal(state[array], without[array]) or not exact
            assert ((state[array] - without[array]).abs() <= 12 * 2.0**-53 * held[array]).all()


@pytest.mark.parametrize("name", FOLDS)
@pytest.mark.parametrize("shape", [(3, 5), (4, 3, 2), (1, 1), (1, 7), (), (0,), (0, 3)])
def test_one_expert_gives_its_delta_and_keeps_its_input(name, shape):
    fold = FOLDS[name]
    for dtype in (torch.float32, torch.float64):
        delta = torch.from_numpy(np.random.default_rng(0).normal(0, 1e-3, shape)).to(dtype)
        before, base = delta.clone(), torch.ones(shape, dtype=torch.bfloat16)
        merged = folded(fold, [delta], [1.0], base)
        assert torch.equal(merged, before.double())
        merged.zero_()
        assert torch.equal(delta, before)
        assert not folded(fold, [torch.zeros(shape)] * 3, [1.0, 2.0, -1.0], torch.zeros(shape)).any()
    joint = ew.consensus(0.4, 2)
    assert torch.equal(joint.combine([before], [1.0], base), before.double())
    assert torch.equal(delta, before)


def test_finishing_leaves_the_state_alone():
    for fold in FOLDS.values():
        state = state_of(fold, BASE.shape)
        fold.add(state, BASE.float(), 1.0, 1)
        fold.add(state, -BASE.float() / 2, 0.5, 1)
        before = {array: tensor.clone() for array, tensor in state.items()}
        fold.finish(state, [1.0, 0.5], BASE).zero_()
        assert all(torch.equal(state[array], before[array]) for array in fold.arrays)
