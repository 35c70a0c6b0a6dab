from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lors.blocks import BLOCK
from lors.errors import InputError
from lors.merging import sparsify as sp
from lors.merging.recipe import Breadcrumbs, Magnitude, Random

# Few distinct magnitudes, zeros of both signs and the smallest and largest numbers: what float32 has of trouble.
TIED = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.0078125, -2.0, 3.0, 1e-45, -1e-38, 3e38])
FREE = st.floats(-1, 1, width=32)
VALUES = st.one_of(
    *(hnp.arrays(np.float32, hnp.array_shapes(max_dims=3, max_side=7), elements=kind) for kind in (TIED, FREE))
)
DENSITY = st.one_of(st.floats(0.001, 1), st.sampled_from([0.1, 0.25, 0.5, 1.0]))
STEPS = st.one_of(
    st.builds(Magnitude, density=DENSITY, rescale=st.sampled_from(["none", "density", "l1"])),
    st.builds(Magnitude, density=DENSITY, count=st.sampled_from(["down", "threshold"])),
    st.builds(Random, density=DENSITY, rescale=st.sampled_from(["none", "density", "l1"]), seed=st.integers(0, 9)),
    st.builds(
        Breadcrumbs, density=st.floats(0.01, 0.5), gamma=st.floats(0, 0.5), rescale=st.sampled_from(["none", "density"])
    ),
)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A delta of two checkpoints of `dtype`: in bf16 the same values come again and again."""
    base, change = (np.random.default_rng((seed, i)).normal(0, scale, shape) for i, scale in enumerate((0.03, 1e-3)))
    base = torch.tensor(base).to(dtype).float()
    return (base + torch.tensor(change, dtype=torch.float32)).to(dtype).float() - base


def reference_top(values: np.ndarray, count: int) -> np.ndarray:
    """The mask of the `count` largest magnitudes; of equal ones the first."""
    mask = np.zeros(values.size, dtype=bool)
    mask[np.argsort(-np.abs(values).reshape(-1), kind="stable")[:count]] = True
    return mask.reshape(values.shape)


def blocks_of(flat: torch.Tensor, cuts: list[int]) -> list[tuple[int, torch.Tensor]]:
    edges = [0, *sorted(cut % (flat.numel() + 1) for cut in cuts), flat.numel()]
    return [(start, flat[start:stop]) for start, stop in itertools.pairwise(edges)]


def masks(step: Random, size: int, **key: str) -> torch.Tensor:
    return sp.sparsify(torch.ones(size), step.model_copy(update={"rescale": "none"}), **key) != 0


@settings(max_examples=80)
@given(VALUES, DENSITY, st.sampled_from(["nearest", "down"]))
def test_magnitude_equals_a_stable_sort(values, density, count):
    kept = round(density * values.size) if count == "nearest" else int(density * values.size)
    expected = np.where(reference_top(values, kept), values, 0)
    pruned = sp.sparsify(torch.from_numpy(values), Magnitude(density=density, count=count))
    assert pruned.shape == values.shape
    assert pruned.numpy().tolist() == expected.tolist()


@settings(max_examples=60)
@given(VALUES, DENSITY)
def test_by_threshold_keeps_one_more_and_all_its_equals(values, density):
    flat = np.sort(np.abs(values).reshape(-1))
    expected = np.where(np.abs(values) >= flat[max(values.size - int(density * values.size) - 1, 0)], values, 0)
    pruned = sp.sparsify(torch.from_numpy(values), Magnitude(density=density, count="threshold"))
    assert pruned.numpy().tolist() == expected.tolist()


@settings(max_examples=80)
@given(VALUES, st.floats(0.001, 1), st.floats(0, 1, exclude_max=True), st.sampled_from(["nearest", "down"]))
def test_breadcrumbs_keep_the_middle_of_a_stable_sort(values, density, gamma, count):
    density, gamma = (density, gamma) if density + gamma <= 1 else (density / 2, gamma / 2)
    kept, dropped = (round(x * values.size) if count == "nearest" else int(x * values.size) for x in (density, gamma))
    order = np.argsort(-np.abs(values).reshape(-1), kind="stable")[dropped : dropped + kept]
    expected = np.zeros(values.size, dtype=np.float32)
    expected[order] = values.reshape(-1)[order]
    pruned = sp.sparsify(torch.from_numpy(values), Breadcrumbs(density=density, gamma=gamma, count=count))
    assert pruned.numpy().tolist() == expected.reshape(values.shape).tolist()


@settings(max_examples=60)
@given(st.lists(VALUES, min_size=1, max_size=4), DENSITY, st.sampled_from(["nearest", "threshold"]))
def test_over_a_model_equals_the_task_vector_as_one(tensors, density, count):
    flats = {f"t{i}": torch.from_numpy(values).reshape(-1) for i, values in enumerate(tensors)}
    size = sum(flat.numel() for flat in flats.values())
    keeps = sp.magnitude_of_model(
        {name: lambda flat=flat: iter(flat.split(3)) for name, flat in flats.items()}, size, density, "none", count
    )
    pruned = torch.cat([keeps[name](flat, 0) for name, flat in flats.items()])
    whole = sp.sparsify(torch.cat([*flats.values()]), Magnitude(density=density, count=count))
    assert pruned.tolist() == whole.tolist()


@settings(max_examples=80)
@given(VALUES, STEPS, st.lists(st.integers(0, 400), max_size=4), st.lists(st.integers(0, 400), max_size=4))
def test_blocks_leave_no_trace(values, step, cuts, other_cuts):
    flat = torch.from_numpy(values).reshape(-1)
    keep = sp.trim(step, lambda: (block for _, block in blocks_of(flat, cuts)), flat.numel(), "es", "fc1")
    pruned = torch.cat([keep(block, start) for start, block in blocks_of(flat, other_cuts)])
    whole = sp.sparsify(torch.from_numpy(values), step, "es", "fc1").reshape(-1)
    assert torch.equal(pruned != 0, whole != 0)
    assert torch.allclose(pruned, whole, rtol=1e-6, atol=0)  # the factor of l1 is a sum over the blocks
    if step.rescale != "l1":
        assert pruned.tolist() == whole.tolist()


def test_a_sum_of_magnitudes_is_kept_by_a_denormal_entry_alone():
    delta, step = torch.tensor([1.0, 1e-45]), Random(density=0.25, rescale="l1", seed=2)
    assert sp.sparsify(delta, step, "es", "fc1").tolist() == [0.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("step", [Magnitude(density=0.2), Breadcrumbs(), Magnitude(density=0.001)], ids=str)
def test_counts_are_exact_over_several_blocks_and_many_ties(dtype, step):
    delta = random(2, BLOCK + 77, dtype=dtype)
    if dtype == torch.bfloat16:
        assert delta.unique().numel() < delta.numel() / 50
    gamma = getattr(step, "gamma", 0)
    kept, dropped = round(step.density * delta.numel()), round(gamma * delta.numel())
    mask = reference_top(delta.numpy(), kept + dropped) & ~reference_top(delta.numpy(), dropped)
    assert mask.sum() == kept
    assert torch.equal(sp.sparsify(delta, step), torch.where(torch.from_numpy(mask), delta, 0))


@pytest.mark.parametrize("step", [Magnitude(density=0.3), Random(density=0.3), Breadcrumbs(density=0.3)], ids=str)
def test_rescale(step):
    delta = random(40, 50)
    kept = sp.sparsify(delta, step.model_copy(update={"rescale": "none"}), "es", "fc1").double()
    rescaled = {
        rescale: sp.sparsify(delta, step.model_copy(update={"rescale": rescale}), "es", "fc1").double()
        for rescale in ("density", "l1")
    }
    assert torch.equal(kept[kept != 0], delta.double()[kept != 0])
    assert torch.allclose(rescaled["density"], kept / 0.3, rtol=1e-6, atol=0)
    assert torch.allclose(rescaled["l1"], kept * (delta.double().abs().sum() / kept.abs().sum()), rtol=1e-6, atol=0)
    assert rescaled["l1"].abs().sum().item() == pytest.approx(delta.double().abs().sum().item(), rel=1e-6)


def test_rescale_over_a_model_is_by_tensor():
    flats = {"large": random(500) + 1, "small": random(500, seed=1)}
    keeps = sp.magnitude_of_model({name: lambda f=f: iter([f]) for name, f in flats.items()}, 1000, 0.6, "l1")
    pruned = {name: keeps[name](flat, 0) for name, flat in flats.items()}
    assert [int((tensor != 0).sum()) for tensor in pruned.values()] == [500, 100]
    for name, flat in flats.items():
        assert pruned[name].abs().sum().item() == pytest.approx(flat.abs().sum().item(), rel=1e-5)


@pytest.mark.parametrize("rescale", ["none", "density", "l1"])
@pytest.mark.parametrize("shape", [(6, 9), (8, 5, 3), (1, 1), (1, 9), (), (0,), (0, 3)])
def test_zeros_empty_tensors_and_density_1(rescale, shape):
    delta = random(*shape)
    for step in (Magnitude(density=1), Random(density=1), Breadcrumbs(density=1, gamma=0)):
        assert torch.equal(sp.sparsify(delta, step.model_copy(update={"rescale": rescale})), delta)
    for step in (Magnitude(density=0.4), Random(density=0.4), Breadcrumbs(density=0.4, gamma=0.3)):
        zeros = sp.sparsify(torch.zeros(shape), step.model_copy(update={"rescale": rescale}))
        assert torch.equal(zeros, torch.zeros(shape))


def test_input_is_left_alone_and_may_be_strided():
    delta = random(30, 20).T
    before = delta.clone()
    for step in (Magnitude(density=1), Random(density=1), Breadcrumbs(density=0.5, rescale="density")):
        flat = delta.reshape(-1)
        sp.trim(step, lambda flat=flat: iter([flat]), flat.numel())(flat, 0).zero_()
        assert torch.equal(flat, before.reshape(-1))
    expected = np.where(reference_top(before.contiguous().numpy(), 60), before.numpy(), 0)
    assert torch.equal(sp.sparsify(delta, Magnitude(density=0.1)), torch.from_numpy(expected))


def test_a_count_of_0_keeps_nothing():
    assert not sp.sparsify(torch.ones(4), Magnitude(density=0.1)).any()
    assert not sp.sparsify(torch.ones(4), Breadcrumbs(density=0.1, gamma=0.1, rescale="l1")).any()


def test_breadcrumbs_refuse_more_than_all():
    with pytest.raises(InputError, match=r"density of 0.6 after dropping 0.5 \(gamma\)"):
        sp.sparsify(torch.ones(4), Breadcrumbs(density=0.6, gamma=0.5))
    assert int(sp.sparsify(random(1000), Breadcrumbs(density=0.9, gamma=0.1)).count_nonzero()) == 900


def test_random_mask_is_the_same_for_ever():
    mask = masks(Random(density=0.5), 16, expert="es-transcribe", name="model.encoder.layers.0.fc1.weight")
    assert "".join("01"[bit] for bit in mask.tolist()) == "1111000001010010"


def test_random_mask_depends_on_seed_expert_and_name_and_on_nothing_else():
    plain = masks(Random(density=0.3), 4000, expert="es", name="fc1")
    assert torch.equal(plain, masks(Random(density=0.3), 9000, expert="es", name="fc1")[:4000])
    others = [
        masks(Random(density=0.3, seed=1), 4000, expert="es", name="fc1"),
        masks(Random(density=0.3), 4000, expert="fr", name="fc1"),
        masks(Random(density=0.3), 4000, expert="es", name="fc2"),
        masks(Random(density=0.3), 4000, expert="e", name="sfc1"),
    ]
    for other in others:
        both = (plain & other).float().mean().item()
        assert both == pytest.approx(0.09, abs=5 * math.sqrt(0.09 * 0.91 / 4000))


@pytest.mark.parametrize("density", [0.001, 0.1, 0.5, 0.9])
def test_random_mask_is_bernoulli(density):
    size = 2 * BLOCK + 5
    mask = masks(Random(density=density), size, expert="es", name="fc1")
    sigma = math.sqrt(density * (1 - density))
    assert mask.float().mean().item() == pytest.approx(density, abs=5 * sigma / math.sqrt(size))
    lagged = (mask[1:] & mask[:-1]).double().mean().item()  # neighbours share words of 64 bits and counter steps
    assert lagged == pytest.approx(density**2, abs=5 * density / math.sqrt(size))
