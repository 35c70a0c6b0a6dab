from __future__ import annotations

import json
import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lors.checkpoint import Checkpoint
from lors.diagnostics import (
    diagnose,
    effective_rank,
    inner_products,
    predicted_loss,
    principal_cosines,
    spectrum,
    task_interference,
)
from lors.errors import CheckpointError, InputError
from lors.task_vector import TaskVector

LAYER = "model.encoder.layers.{}.fc1.weight"
SHAPES = {
    "model.encoder.conv1.weight": (6, 4, 3),
    "model.encoder.layers.2.fc1.weight": (8, 5),
    "model.encoder.layers.2.fc1.bias": (8,),
    "model.encoder.layers.10.fc1.weight": (8, 5),
    "model.encoder.layer_norm.weight": (5,),
    "model.decoder.embed_tokens.weight": (20, 5),
    "model.decoder.layers.0.fc2.weight": (5, 8),
}


class Vector:
    """A task vector in memory."""

    def __init__(self, tensors):
        self.tensors, self.names = tensors, tuple(sorted(tensors))

    def delta(self, name):
        return self.tensors[name]

    def scaled(self, factor):
        return Vector({name: tensor * factor for name, tensor in self.tensors.items()})


def vector(seed, shapes=SHAPES, scale=0.01):
    generator = torch.Generator().manual_seed(seed)
    return Vector({name: scale * torch.randn(shape, generator=generator) for name, shape in shapes.items()})


@pytest.fixture
def base(tensor_folder):
    return Checkpoint(tensor_folder("base", vector(99, scale=1.0).tensors))


def at(table, level="model", **keys):
    """The one row of a table at a level with these keys."""
    for key, value in {"level": level, **keys}.items():
        table = table[table[key] == value]
    assert len(table) == 1
    return table.iloc[0]


def matrix(m, n, seed=0):
    return torch.randn((m, n), generator=torch.Generator().manual_seed(seed))


# One matrix


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 99), st.sampled_from([1e-9, 1.0, 1e4]))
def test_spectrum_equals_numpys_svd(m, n, seed, scale):
    delta = matrix(m, n, seed) * scale
    found = spectrum(delta, 5)
    u, s, vh = np.linalg.svd(delta.double().numpy(), full_matrices=False)
    r = min(5, m, n)
    assert np.allclose(found.values, s, rtol=1e-6, atol=1e-6 * s[0])
    assert found.left.shape == (m, r)
    assert found.right.shape == (n, r)
    ours = found.left.double().numpy() * found.values[:r] @ found.right.double().numpy().T
    assert np.allclose(ours, (u[:, :r] * s[:r]) @ vh[:r], atol=1e-4 * s[0])
    assert found.retained(r) == pytest.approx(np.square(s[:r]).sum(), rel=1e-6)


@pytest.mark.parametrize("shape", [(9000, 3), (3, 9000)])  # more than one chunk of the long side
def test_spectrum_of_a_long_matrix(shape):
    delta = matrix(*shape)
    found = spectrum(delta, 3)
    assert torch.allclose(found.left * torch.from_numpy(found.values).float() @ found.right.T, delta, atol=1e-4)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_a_deficient_rank_has_no_vectors_of_noise(shape):
    delta = matrix(shape[0], 2, 1) @ matrix(2, shape[1], 2)
    found = spectrum(delta, 4)
    assert found.left.shape[1] == found.right.shape[1] == np.count_nonzero(found.values) == 2
    assert spectrum(torch.zeros(shape), 4).left.shape == (shape[0], 0)


def test_effective_rank_golden():
    assert effective_rank(np.array([3.0, 3.0, 3.0, 0.0])) == pytest.approx(3)
    assert effective_rank(np.array([5.0])) == pytest.approx(1)
    assert effective_rank(np.array([0.75, 0.25])) == pytest.approx(
        math.exp(-0.75 * math.log(0.75) + 0.25 * math.log(4))
    )
    assert math.isnan(effective_rank(np.zeros(3)))


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=20))
def test_effective_rank_lies_between_one_and_the_rank(values):
    values = np.array(values)
    if values.any():
        assert 1 - 1e-9 <= effective_rank(values) <= np.count_nonzero(values) * (1 + 1e-9)


@pytest.mark.parametrize("shape", [(600, 700), (5,), (), (2, 3, 4), (0, 4)])  # the first is walked in two blocks
def test_inner_products_equal_numpys(shape):
    deltas = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    deltas[0] = deltas[0] * (deltas[0] > 0)
    found = inner_products(deltas)
    for i, a in enumerate(deltas):
        for j, b in enumerate(deltas):
            product = a.double().numpy() * b.double().numpy()
            assert found.dot[i, j] == pytest.approx(product.sum())
            assert found.absolute[i, j] == pytest.approx(np.abs(product).sum())
            assert found.sign[i, j] == np.sign(product).sum()
            assert found.both[i, j] == np.count_nonzero(product)


@given(st.integers(2, 20), st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
def test_principal_cosines_equal_scipys_angles(m, r, s, seed):
    first, second = (
        np.linalg.qr(matrix(m, min(m, k), seed + k).double().numpy())[0] for k, seed in ((r, seed), (s, seed + 7))
    )
    cosines = principal_cosines(first.T @ second)
    assert np.allclose(np.sort(np.arccos(cosines)), np.sort(scipy.linalg.subspace_angles(first, second)), atol=1e-6)


def test_task_interference_is_the_norm_of_each_in_the_others_subspaces():
    first, second = (np.linalg.svd(matrix(7, 9, seed).double().numpy(), full_matrices=False) for seed in (1, 2))
    (u1, s1, v1), (u2, s2, v2) = ((u[:, :k], s[:k], v[:k]) for (u, s, v), k in ((first, 3), (second, 2)))
    found = task_interference(u1.T @ u2, v1 @ v2.T, s1, s2)
    in_first = u1 @ u1.T @ (u2 * s2 @ v2) @ v1.T @ v1
    in_second = u2 @ u2.T @ (u1 * s1 @ v1) @ v2.T @ v2
    assert found == pytest.approx(np.linalg.norm(in_first) + np.linalg.norm(in_second))
    # Gargiulo et al. 2025: the same two blocks, out of (U'U - I) S (V'V - I).
    u, s, v = np.hstack([u1, u2]), np.diag([*s1, *s2]), np.vstack([v1, v2]).T
    blocks = (u.T @ u - np.eye(5)) @ s @ (v.T @ v - np.eye(5))
    assert found == pytest.approx(np.linalg.norm(blocks[:3, :3]) + np.linalg.norm(blocks[3:, 3:]))
    assert task_interference(np.eye(3), np.eye(3), s1, s1) == pytest.approx(2 * np.linalg.norm(s1))


@pytest.mark.parametrize("scaling", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("unit", [1.0, 1e-60])
def test_predicted_loss_is_the_quadratic_form(scaling, unit):
    own, other = (matrix(4, 6, seed).double().numpy() for seed in (1, 2))
    u, s, vh = np.linalg.svd(own, full_matrices=False)
    step = scaling * (own + other) - own
    expected = np.linalg.norm(own.T @ step @ own.T) ** 2 / np.linalg.norm(own.T @ own @ own.T) ** 2
    assert predicted_loss(unit * (u.T @ other @ vh.T), unit * s, scaling) == pytest.approx(expected)
    assert predicted_loss(np.zeros((4, 4)), s, scaling) == pytest.approx((1 - scaling) ** 2)


# A whole model


def test_figures_of_experts_equal_numpys(base):
    experts = {"a": vector(1), "b": vector(2)}
    found = diagnose(base, experts)
    flat = np.concatenate([experts["a"].tensors[name].double().numpy().ravel() for name in SHAPES])
    basic = np.concatenate([base.tensor(name).double().numpy().ravel() for name in SHAPES])
    row = at(found.experts, expert="a")
    assert row.norm == pytest.approx(np.linalg.norm(flat))
    assert row.energy == pytest.approx(flat @ flat)
    assert row.relative_norm == pytest.approx(np.linalg.norm(flat) / np.linalg.norm(basic))
    ranks, weights, kept = [], [], 0.0
    for name, shape in SHAPES.items():
        if len(shape) > 1:
            delta = experts["a"].tensors[name].double().numpy().reshape(shape[0], -1)
            s = np.linalg.svd(delta, compute_uv=False)
            p = s / s.sum()
            ranks.append([math.exp(-(p * np.log(p)).sum()), (s**2).sum() / s[0] ** 2, len(s)])
            weights.append((s**2).sum())
            kept += np.square(s[: max(1, round(0.2 * len(s)))]).sum()
            one = at(found.experts, "tensor", name=name, expert="a")
            assert [one.effective_rank, one.stable_rank] == pytest.approx(ranks[-1][:2])
            assert one.effective_rank_ratio == pytest.approx(ranks[-1][0] / len(s))
    assert [row.effective_rank, row.stable_rank] == pytest.approx(np.average(ranks, axis=0, weights=weights)[:2])
    assert at(found.spectra, expert="a", rank_ratio=0.2).retained_energy == pytest.approx(kept / sum(weights))
    assert at(found.spectra, expert="a", rank_ratio=1.0).retained_energy == pytest.approx(1)
    for level in ("tensor", "layer", "part", "model"):
        rows = found.experts[(found.experts.level == level) & (found.experts.expert == "a")]
        assert rows.energy_share.sum() == pytest.approx(1)
    tokens = experts["a"].tensors["model.decoder.embed_tokens.weight"].double().square().sum().item()
    assert at(found.experts, "part", name="embeddings", expert="a").energy_share == pytest.approx(
        tokens / (flat @ flat)
    )
    assert list(dict.fromkeys(found.experts[found.experts.level == "part"].name)) == [
        "encoder",
        "embeddings",
        "decoder",
    ]


def test_figures_of_pairs_equal_numpys(base):
    experts = {"b": vector(2), "a": vector(1)}
    found = diagnose(base, experts, rank_ratios=[0.4], scaling=0.7)
    a, b = (np.concatenate([experts[e].tensors[name].double().numpy().ravel() for name in SHAPES]) for e in ("a", "b"))
    row = at(found.pairs, first="a", second="b")
    assert row.cosine == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    assert row.sign_conflict == pytest.approx(np.mean(a * b < 0))
    assert row.weighted_sign_conflict == pytest.approx(np.abs(a * b)[a * b < 0].sum() / np.abs(a * b).sum())
    name = LAYER.format(10)
    (u1, s1, v1), (u2, s2, v2) = (
        np.linalg.svd(experts[e].tensors[name].double().numpy(), full_matrices=False) for e in ("a", "b")
    )
    (u1, s1, v1), (u2, s2, v2) = ((u[:, :2], s[:2], v[:2]) for u, s, v in ((u1, s1, v1), (u2, s2, v2)))
    space = at(found.subspaces, "tensor", name=name)
    assert space.left_overlap == pytest.approx(np.square(u1.T @ u2).sum() / 2, abs=1e-5)
    assert space.right_overlap == pytest.approx(np.square(v1 @ v2.T).sum() / 2, abs=1e-5)
    assert [space.left_chance, space.right_chance] == pytest.approx([2 / 8, 2 / 5])
    angles = np.degrees(scipy.linalg.subspace_angles(u1, u2))
    assert [space.left_angle, space.left_smallest] == pytest.approx([np.median(angles), angles.min()], abs=1e-2)
    shared = np.linalg.norm(u1.T @ (u2 * s2 @ v2) @ v1.T) + np.linalg.norm(u2.T @ (u1 * s1 @ v1) @ v2.T)
    assert space.interference == pytest.approx(shared / (np.linalg.norm(s1) + np.linalg.norm(s2)), abs=1e-5)
    losses = []
    for own, other, (u, s, v) in (("a", "b", (u1, s1, v1)), ("b", "a", (u2, s2, v2))):
        x = 0.7 * u.T @ (experts[own].tensors[name] + experts[other].tensors[name]).double().numpy() @ v.T - np.diag(s)
        losses.append(np.square(s[:, None] * x * s).sum() / (s**6).sum())
    assert at(found.pairs, "tensor", name=name).predicted_loss == pytest.approx(np.mean(losses), abs=1e-4)


def test_layers_come_in_the_order_of_the_model(base):
    table = diagnose(base, {"a": vector(1)}).experts
    assert table[table.level == "layer"].name.tolist() == [
        "encoder.conv1", "encoder.layers.2", "encoder.layers.10", "encoder.layer_norm", "decoder.embed_tokens",
        "decoder.layers.0",
    ]  # fmt: skip


def test_overlap_of_random_subspaces_is_chance(tensor_folder):
    shapes = {"x.weight": (300, 200)}
    base = Checkpoint(tensor_folder("base", vector(99, shapes).tensors))
    row = at(diagnose(base, {"a": vector(1, shapes), "b": vector(2, shapes)}).subspaces, rank_ratio=0.2)
    assert row.left_overlap == pytest.approx(row.left_chance, abs=0.01)
    assert row.right_overlap == pytest.approx(row.right_chance, abs=0.01)
    assert [row.left_chance, row.right_chance] == pytest.approx([40 / 300, 40 / 200])


@settings(max_examples=10)
@given(st.integers(0, 50), st.floats(0.1, 10), st.floats(0.1, 10))
def test_a_pair_is_symmetric_and_free_of_scale(folder_base, seed, left, right):
    a, b = vector(seed), vector(seed + 1000)
    one = diagnose(folder_base, {"a": a, "b": b})
    other = diagnose(folder_base, {"a": b.scaled(right), "b": a.scaled(left)})
    scale_free = ["cosine", "sign_conflict", "weighted_sign_conflict"]
    assert np.allclose(one.pairs[scale_free], other.pairs[scale_free], atol=1e-5)
    overlaps = ["left_overlap", "right_overlap"]
    tensors = one.subspaces.level == "tensor"
    assert np.allclose(one.subspaces[tensors][overlaps], other.subspaces[tensors][overlaps], atol=1e-3)
    both = diagnose(folder_base, {"a": a.scaled(left), "b": b.scaled(left)})
    assert np.allclose(one.subspaces.interference, both.subspaces.interference, atol=1e-3)
    assert np.allclose(one.pairs.predicted_loss, both.pairs.predicted_loss, atol=1e-3, equal_nan=True)


@pytest.fixture(scope="session")
def folder_base(tmp_path_factory):
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("base")
    save_file(vector(99, scale=1.0).tensors, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "whisper"}')
    return Checkpoint(folder)


@pytest.mark.parametrize(("factor", "cosine", "conflict", "loss"), [(1, 1, 0, 0.0), (-1, -1, 1, 1.0), (3, 1, 0, None)])
def test_identical_and_opposite_experts(base, factor, cosine, conflict, loss):
    found = diagnose(base, {"a": vector(1), "b": vector(1).scaled(factor)})
    for row in found.pairs.itertuples():
        assert row.cosine == pytest.approx(cosine)
        assert row.sign_conflict == conflict
        assert row.weighted_sign_conflict == pytest.approx(conflict)
        if loss is not None and row.level == "model":
            assert row.predicted_loss == pytest.approx(loss, abs=1e-6)
    for row in found.subspaces.itertuples():
        assert [row.left_overlap, row.right_overlap] == pytest.approx([1, 1], abs=1e-5)
        if factor != 3:
            assert row.interference == pytest.approx(1, abs=1e-5)


def test_disjoint_experts_do_not_meet(base):
    a, b = vector(1), vector(2)
    for name, tensor in a.tensors.items():
        half = tensor.shape[0] // 2
        tensor[half:] = 0
        b.tensors[name][:half] = 0
    found = diagnose(base, {"a": a, "b": b})
    row = at(found.pairs, first="a", second="b")
    assert row.cosine == 0
    assert math.isnan(row.sign_conflict)  # no entry where both are there
    assert (found.subspaces.left_overlap < 1e-9).all()
    assert (found.subspaces.interference < 1e-5).all()


def test_zeros_vectors_and_empty_tensors_are_left_out_of_what_they_do_not_define(tensor_folder):
    shapes = {
        "x.weight": (4, 6),
        "y.bias": (4,),
        "z.weight": (0, 3),
        "w.scale": (),
        "v.weight": (1, 1),
        "u.weight": (1, 7),
    }
    base = Checkpoint(tensor_folder("base", vector(99, shapes).tensors))
    a, zero = vector(1, shapes), vector(1, shapes).scaled(0)
    found = diagnose(base, {"a": a, "zero": zero}, rank_ratios=[0.5, 1.0])
    assert at(found.experts, expert="zero").norm == 0
    assert math.isnan(at(found.experts, expert="zero").effective_rank)
    assert math.isnan(at(found.experts, "tensor", name="y.bias", expert="a").effective_rank)
    assert at(found.experts, "tensor", name="v.weight", expert="a").effective_rank == pytest.approx(1)
    assert math.isnan(at(found.pairs).cosine)
    assert found.subspaces.empty
    same = diagnose(base, {"a": a, "b": a}, rank_ratios=[0.5, 1.0])
    assert at(same.subspaces, rank_ratio=1.0).interference == pytest.approx(1)
    assert at(same.subspaces, "tensor", name="x.weight", rank_ratio=1.0).left_chance == 1


def test_one_expert_has_no_pairs(base):
    found = diagnose(base, {"only": vector(1)})
    assert found.pairs.empty
    assert found.subspaces.empty
    assert found.table().count("\n") == 3
    assert "pair" not in found.table()


def test_json_has_no_nan_and_the_table_no_nan_either(base):
    found = diagnose(base, {"a": vector(1), "zero": vector(2).scaled(0)})
    record = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert {*record} == {"base", "scaling", "rank_ratios", "experts", "spectra", "pairs", "subspaces"}
    (row,) = [row for row in record["pairs"] if row["level"] == "model"]
    assert row["cosine"] is None
    assert "nan" not in found.table()


def test_the_table_puts_the_most_interference_first(base):
    a = vector(1)
    near = Vector({name: tensor + 0.1 * vector(2).tensors[name] for name, tensor in a.tensors.items()})
    text = diagnose(base, {"nan|cy": a, "near": near, "zfar": vector(3)}).table()
    lines = text.splitlines()
    assert lines[0].startswith("| expert | norm | relative | effective rank | of full rank | retained at 0.05 |")
    assert lines[8].startswith("| nan\\|cy + near |")
    assert text.count("chance") == 2


def test_progress_counts_parameters_and_ends_at_all(base):
    seen = []
    diagnose(base, {"a": vector(1)}, on_progress=lambda done, total: seen.append((done, total)))
    assert len(seen) == len(SHAPES)
    assert seen[-1] == (base.parameters, base.parameters)


def test_real_checkpoints(tiny_whisper_folder):
    base, first, second = (Checkpoint(tiny_whisper_folder(seed)) for seed in range(3))
    found = diagnose(base, {"a": TaskVector(base, first), "b": TaskVector(base, second)})
    assert {*found.experts[found.experts.level == "part"].name} == {"encoder", "embeddings", "decoder"}
    assert at(found.pairs).cosine == pytest.approx(0.5, abs=0.05)  # they share the base that is subtracted


def test_bad_input_is_refused(base):
    with pytest.raises(InputError, match="no expert"):
        diagnose(base, {})
    for ratios in ([], [0.0, 0.5], [1.5], [math.nan]):
        with pytest.raises(InputError, match="rank ratios"):
            diagnose(base, {"a": vector(1)}, rank_ratios=ratios)
    less = {name: shape for name, shape in SHAPES.items() if "conv1" not in name}
    with pytest.raises(CheckpointError, match=r"the task vector a has no tensor model\.encoder\.conv1\.weight"):
        diagnose(base, {"a": vector(1, less)})
    with pytest.raises(CheckpointError, match=r"base has no tensor more"):
        diagnose(base, {"a": vector(1, {**SHAPES, "more": (1,)})})
    with pytest.raises(CheckpointError, match=r"conv1.weight is \[6, 4, 1\] in a"):
        diagnose(base, {"a": vector(1, {**SHAPES, "model.encoder.conv1.weight": (6, 4, 1)})})
    bad = vector(1)
    bad.tensors[LAYER.format(2)][0, 0] = math.inf
    with pytest.raises(CheckpointError, match=r"layers.2.fc1.weight in a holds NaN or infinity"):
        diagnose(base, {"a": bad})
