"""Which utterances a batch holds."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lors.speech.features import window_for
from lors.training.batches import Draw, batches, draws, share

lengths = st.lists(st.integers(1, 200).map(lambda n: n / 100), min_size=1, max_size=80)


def window(seconds: float) -> float:
    return window_for(seconds, 2.0)


@given(lengths, st.floats(0.5, 40))
def test_batches_cover_an_epoch_within_the_budget(seconds: list[float], budget: float) -> None:
    found = [Draw(index, 0) for index in range(len(seconds))]
    made = batches(found, dict(zip(found, seconds, strict=True)), budget, window, random.Random(1))
    assert sorted(draw.index for batch in made for draw in batch) == list(range(len(seconds)))
    for batch in made:
        padded = len(batch) * window(max(seconds[draw.index] for draw in batch))
        assert batch
        assert len(batch) == 1 or padded <= budget
    assert made == batches(found, dict(zip(found, seconds, strict=True)), budget, window, random.Random(1))


@given(st.lists(st.integers(), max_size=30), st.integers(1, 8))
def test_shares_make_up_the_batch(numbers: list[int], count: int) -> None:
    batch = [Draw(number, 0) for number in numbers]
    shares = [share(batch, number, count) for number in range(count)]
    assert list(itertools.chain(*shares)) == batch
    sizes = {len(part) for part in shares}
    assert max(sizes) - min(sizes) <= 1


def test_an_epoch_is_everything_once_in_its_own_order() -> None:
    epochs = list(itertools.islice(draws(["a", "b"] * 30, 1.0, 0), 3))
    assert [sorted(draw.index for draw in epoch) for epoch in epochs] == [list(range(60))] * 3
    assert [{draw.epoch for draw in epoch} for epoch in epochs] == [{0}, {1}, {2}]
    assert len({tuple(draw.index for draw in epoch) for epoch in epochs}) == 3
    assert epochs == list(itertools.islice(draws(["a", "b"] * 30, 1.0, 0), 3))
    assert epochs != list(itertools.islice(draws(["a", "b"] * 30, 1.0, 1), 3))


@pytest.mark.parametrize("temperature", [1.0001, 2.0, 5.0, 1e9])
def test_temperature_lifts_small_groups(temperature: float) -> None:
    groups = ["large"] * 900 + ["small"] * 100
    epochs = list(itertools.islice(draws(groups, temperature, 3), 20))
    assert all(len(epoch) == 1000 for epoch in epochs)
    small = sum(draw.index >= 900 for epoch in epochs for draw in epoch) / 20_000
    expected = 100 ** (1 / temperature) / (900 ** (1 / temperature) + 100 ** (1 / temperature))
    # Four standard errors of 20000 draws.
    assert small == pytest.approx(expected, abs=4 * 0.5 / 20_000**0.5)
    assert epochs == list(itertools.islice(draws(groups, temperature, 3), 20))


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=40), st.floats(1.1, 10), st.integers(1, 4))
def test_no_example_comes_again_before_its_group_is_used_up(groups: list[str], temperature: float, epochs: int) -> None:
    taken = [d for epoch in itertools.islice(draws(groups, temperature, 0), epochs) for d in epoch]
    assert len(set(taken)) == len(taken)  # an example has another epoch each time
    for group in set(groups):
        own = [draw for draw in taken if groups[draw.index] == group]
        size = groups.count(group)
        for start in range(0, len(own), size):
            assert {draw.epoch for draw in own[start : start + size]} == {start // size}
    counts = Counter(draw.index for draw in taken)
    for group in set(groups):
        used = [counts[index] for index, other in enumerate(groups) if other == group]
        assert max(used) - min(used) <= 1
