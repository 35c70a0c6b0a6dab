"""Recovery: fixed points, one formula for error rates and BLEU, undefined where there is nothing to recover."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lors.scoring.recovery import complete_mean, ratio_to_expert, recovery

SCORES = st.floats(0, 150)


def test_by_hand() -> None:
    assert recovery(40.0, 25.0, 20.0) == pytest.approx(0.75)  # WER falls from 40 towards 20
    assert recovery(10.0, 25.0, 30.0) == pytest.approx(0.75)  # BLEU rises from 10 towards 30
    assert recovery(40.0, 50.0, 20.0) == pytest.approx(-0.5)
    assert recovery(40.0, 15.0, 20.0) == pytest.approx(1.25)


@given(SCORES, SCORES, SCORES)
def test_base_is_0_expert_is_1_and_the_direction_does_not_matter(base: float, system: float, expert: float) -> None:
    if base == expert:
        assert recovery(base, system, expert) is None
        return
    assert recovery(base, base, expert) == 0
    assert recovery(base, expert, expert) == 1
    assert recovery(-base, -system, -expert) == recovery(base, system, expert)


def test_no_zero_is_negative() -> None:
    assert str(recovery(10.0, 10.0, 30.0)) == "0.0"


def test_ratio_to_expert_is_above_1_where_better() -> None:
    assert ratio_to_expert("wer", 20.0, 10.0) == pytest.approx(0.5)
    assert ratio_to_expert("cer", 5.0, 10.0) == pytest.approx(2.0)
    assert ratio_to_expert("bleu", 20.0, 10.0) == pytest.approx(2.0)
    assert ratio_to_expert("wer", 0.0, 10.0) is None
    assert ratio_to_expert("bleu", 10.0, 0.0) is None


def test_a_mean_is_complete_or_none() -> None:
    assert complete_mean([1.0, 3.0]) == 2.0
    assert complete_mean([1.0, None]) is None
    assert complete_mean([]) is None
