"""The search for the scaling coefficients: what is tried, what is chosen."""

from __future__ import annotations

import random
from typing import Any, Literal, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lors.merging.settings import ScalingSearch
from lors.scaling import PARTS, Round, choose, chosen_value, higher_is_better, part_of, points, propose, schedule
from lors.scoring.metrics import LOWER_IS_BETTER, METRICS

EXPERTS = ("es-transcribe", "fr-transcribe", "fr-translate")
PER: tuple[Literal["model", "part", "expert"], ...] = ("model", "part", "expert")

coefficients = st.lists(st.floats(0, 4), min_size=1, max_size=6).map(tuple)


def at(scaling: float, value: float, **factors: float) -> dict[str, Any]:
    return {"scaling": scaling, "factors": factors, "value": value}


tried = st.lists(
    st.builds(
        lambda scaling, value, factors: at(scaling, value, **factors),
        st.sampled_from([0.0, 0.3, 0.6]),
        st.sampled_from([1.0, 2.0, 2.5]),
        st.dictionaries(st.sampled_from(PARTS), st.sampled_from([0.0, 0.5, 1.25, 1.5])),
    ),
    min_size=1,
)


@given(tried, st.booleans(), st.randoms(use_true_random=False))
def test_the_choice_is_the_best_in_any_order(found: list[dict[str, Any]], higher: bool, order: random.Random) -> None:
    best = choose(found, higher)
    assert best["value"] == (max if higher else min)(point["value"] for point in found)
    shuffled = order.sample(found, len(found))
    assert choose(shuffled, higher) == best
    turned = [{**point, "value": -point["value"]} for point in found]
    assert choose(turned, not higher) == {**best, "value": -best["value"]}
    for rival in found:
        if rival["value"] == best["value"]:
            assert rival["scaling"] >= best["scaling"]


def test_of_equals_the_smaller_coefficient_wins_and_then_the_factors_nearest_to_1() -> None:
    assert choose([at(0.6, 5), at(0.3, 5), at(0.2, 6)], False)["scaling"] == 0.3
    stayed, near, far = at(0.3, 5), at(0.3, 5, encoder=1.25), at(0.3, 5, encoder=0.5)
    assert choose([far, near, stayed], True) == stayed
    assert choose([far, near], True) == near
    assert choose([at(0.3, 5, decoder=1.25), at(0.3, 5, encoder=1.25)], False)["factors"] == {"decoder": 1.25}
    assert choose([stayed, at(0.3, 4.9, encoder=0.5)], False)["factors"] == {"encoder": 0.5}


def test_the_value_of_what_was_chosen_is_known_where_it_was_searched() -> None:
    points = [at(0.3, 40), at(0.6, 30, encoder=1.25), at(0.6, 35)]
    assert chosen_value({"scaling": 0.6, "factors": {"encoder": 1.25}, "points": points}) == 30
    assert chosen_value({"scaling": 0.6, "factors": {}, "points": []}) is None


def test_every_metric_of_a_search_has_the_direction_of_the_score() -> None:
    metrics = get_args(ScalingSearch.model_fields["metric"].annotation)
    assert {*METRICS} | {"score", "loss"} == {*metrics}
    for metric in metrics:
        assert higher_is_better(metric) == (metric not in {"score", "loss", *LOWER_IS_BETTER})


@given(coefficients, st.sampled_from(PER), coefficients, st.integers(1, 3), st.one_of(st.none(), st.integers(1, 40)))
def test_the_budget_is_never_exceeded_and_never_left_where_there_is_more_to_try(
    values: tuple[float, ...],
    per: Literal["model", "part", "expert"],
    factors: tuple[float, ...],
    rounds: int,
    budget: int | None,
) -> None:
    search = ScalingSearch(search=values, per=per, factors=factors, rounds=rounds, budget=budget)
    whole = schedule(search.model_copy(update={"budget": None}), EXPERTS)
    cut = schedule(search, EXPERTS)
    count = points(search, EXPERTS)
    everything = sum(len(one.values) for one in whole)
    assert count == (everything if budget is None else min(budget, everything))
    names = {"model": [], "part": [*PARTS], "expert": [*EXPERTS]}[per]
    assert [one.coordinate for one in whole] == [None, *(names * rounds)]
    assert all(one.values for one in cut)

    def flat(rounds: list[Round]) -> list[tuple[str | None, float]]:
        return [(one.coordinate, value) for one in rounds for value in one.values]

    assert flat(cut) == flat(whole)[:count]
    for one in whole:
        assert len(set(one.values)) == len(one.values)


def test_a_value_given_twice_is_tried_once() -> None:
    search = ScalingSearch(search=(0.3, 0.6, 0.3), per="part", factors=(0.5, 0.5), budget=3)
    assert schedule(search, EXPERTS) == [Round(None, (0.3, 0.6)), Round("encoder", (0.5,))]


def test_a_proposal_multiplies_one_factor_and_leaves_the_best_as_it_is() -> None:
    best = {"scaling": 0.3, "factors": {"encoder": 0.5}, "points": []}
    assert propose(best, "decoder", 1.25) == {"scaling": 0.3, "factors": {"encoder": 0.5, "decoder": 1.25}}
    assert propose(best, "encoder", 1.5) == {"scaling": 0.3, "factors": {"encoder": 0.75}}
    assert propose(best, "encoder", 0) == {"scaling": 0.3, "factors": {"encoder": 0}}
    assert propose(best, "encoder", 2) == {"scaling": 0.3, "factors": {}}
    assert best == {"scaling": 0.3, "factors": {"encoder": 0.5}, "points": []}


@pytest.mark.parametrize("factor", [0.5, 0.7, 0.8, 1.1, 1.25, 1.5, 3.0])
def test_a_proposal_and_its_inverse_are_the_point_itself(factor: float) -> None:
    """So that the search knows it again, whatever the products are rounded to."""
    best = {"scaling": 0.3, "factors": {"encoder": 0.1}}
    assert propose(propose(best, "encoder", factor), "encoder", 1 / factor) == best
    assert propose(best, "decoder", 1) == best


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.encoder.layers.0.fc1.weight", "encoder"),
        ("model.decoder.layers.0.encoder_attn.k_proj.weight", "decoder"),
        ("model.decoder.embed_tokens.weight", "decoder"),
        ("proj_out.weight", "decoder"),
        ("encoder.conv1.bias", "encoder"),
    ],
)
def test_every_parameter_has_a_part(name: str, part: str) -> None:
    assert part_of(name) == part
    assert part in PARTS
