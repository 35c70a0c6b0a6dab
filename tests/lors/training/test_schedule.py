"""The learning rate over a training."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lors.training.schedule import learning_rate_for, rate_share

schedules = st.sampled_from(["linear", "cosine", "constant"])


@pytest.mark.parametrize("warmup", [0.0, 0.25, 0.9])
def test_linear(warmup: float) -> None:
    rising = max(1, round(12 * warmup))
    expected = [(step + 1) / rising for step in range(rising)]
    expected += [(12 - step) / (12 - rising) for step in range(rising, 12)]
    assert [rate_share(step, 12, warmup, "linear") for step in range(12)] == pytest.approx(expected)


def test_cosine_and_constant() -> None:
    assert rate_share(4, 12, 0.0, "cosine") == pytest.approx((1 + math.cos(math.pi * 3 / 11)) / 2)
    assert [rate_share(step, 8, 0.5, "constant") for step in range(8)] == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]


@given(st.integers(1, 500), st.floats(0, 0.99), schedules, st.floats(0, 1))
def test_bounds_and_the_end(steps: int, warmup: float, schedule: str, done: float) -> None:
    assert 0 <= rate_share(done * steps, steps, warmup, schedule) <= 1
    if schedule != "constant":
        assert rate_share(steps, steps, warmup, schedule) == pytest.approx(0)
    shares = [rate_share(step, steps, warmup, schedule) for step in range(steps)]
    top = shares.index(max(shares))
    assert shares[:top] == sorted(shares[:top])
    assert shares[top:] == sorted(shares[top:], reverse=True)


def test_learning_rate_by_size() -> None:
    sizes = (39e6, 74e6, 244e6, 769e6, 1550e6)
    assert [learning_rate_for(int(size)) for size in sizes] == [3.75e-5, 2.5e-5, 1.25e-5, 6.25e-6, 5e-6]
