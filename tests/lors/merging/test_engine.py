from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_limits

from lors.blocks import BLOCK
from lors.checkpoint import Checkpoint
from lors.delta_file import DeltaFile, write
from lors.errors import CheckpointError, InputError
from lors.low_rank import load_lapack
from lors.merging import METHODS, make_recipe
from lors.merging.combiners import Fold
from lors.merging.engine import Merger
from lors.merging.parts import combiner
from lors.merging.recipe import Combine, Lors, Magnitude, Recipe, Star, Step
from lors.merging.registry import STEPS
from lors.merging.sparsify import sparsify
from lors.merging.spectral import star
from lors.prune import PruneSettings, prune_delta, prune_task_vector
from lors.task_vector import TaskVector, extract

SHAPES = {
    "model.decoder.embed_tokens.weight": (BLOCK // 96 + 300, 96),  # two row blocks
    "model.encoder.conv1.weight": (6, 5, 3),
    "model.encoder.fc1.bias": (7,),
    "model.encoder.fc1.weight": (8, 12),
    "nothing": (0, 4),
    "scale": (),
}
EXPERTS = ("es", "fr")
WEIGHTS = {"es": 1.0, "fr": 0.7}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    """A base and two experts with a matrix of two row blocks, a convolution, a vector, an empty tensor, a scalar."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(3)
    made = {}
    for number, name in enumerate(("base", *EXPERTS)):
        folder = tmp_path_factory.mktemp("engine") / name
        folder.mkdir()
        (folder / "config.json").write_text('{"model_type": "whisper"}')
        torch.manual_seed(0)
        tensors = {n: torch.randn(shape, generator=torch.Generator().manual_seed(9)) for n, shape in SHAPES.items()}
        if number:
            tensors = {n: t + 0.01 * torch.randn(t.shape, generator=generator) for n, t in tensors.items()}
        save_file(tensors, folder / "model.safetensors")
        made[name] = Checkpoint(folder)
    return made


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The engine computes on one thread each, and a trim may hang on the last bit: so do the references."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    load_lapack()
    with threadpool_limits(1):
        yield
    torch.set_num_threads(threads)


def vectors(models: Mapping[str, Checkpoint]) -> dict[str, TaskVector]:
    return {expert: TaskVector(models["base"], models[expert]) for expert in EXPERTS}


def merged(models: Mapping[str, Checkpoint], recipe: Recipe, **options: object) -> dict[str, torch.Tensor]:
    with Merger(models["base"], vectors(models), recipe, WEIGHTS, **options) as merger:  # type: ignore[arg-type]
        return dict(merger.deltas())


def merged_files(models: Mapping[str, Checkpoint], files: Mapping[str, DeltaFile], recipe: Recipe) -> Any:
    with Merger(models["base"], files, recipe, WEIGHTS) as merger:
        return dict(merger.deltas())


def whole_model(deltas: dict[str, torch.Tensor], step: Magnitude) -> dict[str, torch.Tensor]:
    """A trim over all tensors together, by a stable sort of every entry."""
    flat = torch.cat([delta.reshape(-1) for delta in deltas.values()])
    keep = torch.zeros(len(flat), dtype=torch.bool)
    order = np.argsort(-flat.abs().numpy(), kind="stable")
    keep[torch.from_numpy(order[: round(step.density * len(flat))].copy())] = True
    parts = torch.split(torch.where(keep, flat, 0.0), [delta.numel() for delta in deltas.values()])
    return {name: part.reshape(delta.shape) for (name, delta), part in zip(deltas.items(), parts, strict=True)}


def stepped(deltas: dict[str, torch.Tensor], step: Step, expert: str) -> dict[str, torch.Tensor]:
    if isinstance(step, Lors):
        return {name: prune_delta(delta, step, name).dense() for name, delta in deltas.items()}
    if isinstance(step, Star):
        return {name: star(delta, step.eta) for name, delta in deltas.items()}
    if isinstance(step, Magnitude) and step.scope == "model":
        return whole_model(deltas, step)
    return {name: sparsify(delta, step, expert, name) for name, delta in deltas.items()}


def reference(
    models: Mapping[str, Checkpoint], recipe: Recipe, weights: Mapping[str, float] = WEIGHTS
) -> dict[str, torch.Tensor]:
    """The recipe on whole tensors that are all in memory."""
    experts = {}
    for expert in EXPERTS:
        deltas = dict(extract(models["base"], models[expert]))
        for step in recipe.steps:
            deltas = stepped(deltas, step, expert)
        experts[expert] = deltas
    how = combiner(recipe.combine)
    result = {}
    for name in models["base"].float_names:
        base, parts = models["base"].tensor(name), [experts[expert][name] for expert in EXPERTS]
        if isinstance(how, Fold):
            state = {array: torch.zeros(base.shape, dtype=torch.float64) for array in how.arrays}
            for part, weight in zip(parts, weights.values(), strict=True):
                how.add(state, part, weight, 1)
            result[name] = how.finish(state, [*weights.values()], base)
        else:
            result[name] = how.combine(parts, [*weights.values()], base)
    return result


COMBINERS: dict[str, Combine] = {method.combine.kind: method.combine for method in METHODS.values()}
PAIRS = [(step, kind) for step in (None, *STEPS) for kind in COMBINERS]


@pytest.mark.parametrize(("step", "kind"), PAIRS, ids=[f"{step or 'nothing'}-{kind}" for step, kind in PAIRS])
def test_every_step_composes_with_every_combiner(models, step, kind):
    weights = WEIGHTS if kind not in {"slerp", "model_stock"} else dict.fromkeys(EXPERTS, 1.0)
    recipe = Recipe(steps=(STEPS[step],) if step else (), combine=COMBINERS[kind])
    expected = reference(models, recipe, weights)
    with Merger(models["base"], vectors(models), recipe, weights, workers=2) as merger:
        found = dict(merger.deltas())
    for name, shape in SHAPES.items():
        assert tuple(found[name].shape) == shape
        assert torch.allclose(found[name].double(), expected[name].double(), rtol=1e-5, atol=1e-8), name


def test_steps_come_one_after_the_other(models):
    before = [Lors(rank_ratio=0.3, density=0.2), Magnitude(density=0.5, scope="tensor")]
    recipe = make_recipe("ties", before=before)
    found, expected = merged(models, recipe, workers=2), reference(models, recipe)
    for name in SHAPES:
        assert torch.allclose(found[name].double(), expected[name].double(), rtol=1e-5, atol=1e-8)


def test_a_trim_of_the_whole_model_after_a_decomposition_leaves_no_scratch(models, tmp_path):
    recipe = Recipe(steps=(Star(eta=0.9), Lors(), Magnitude(density=0.1)))
    expected = reference(models, recipe)
    with Merger(models["base"], vectors(models), recipe, WEIGHTS, scratch=tmp_path) as merger:
        assert len([*tmp_path.iterdir()]) == 1
        found = dict(merger.deltas())
    assert [*tmp_path.iterdir()] == []
    for name in SHAPES:
        assert torch.allclose(found[name].double(), expected[name].double(), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("method", METHODS)
def test_workers_and_order_leave_no_trace(models, method):
    recipe, weights = make_recipe(method), dict.fromkeys(EXPERTS, 1.0)
    runs = []
    for workers, experts in ((1, vectors(models)), (3, dict(reversed(vectors(models).items())))):
        with Merger(models["base"], experts, recipe, weights, workers=workers) as merger:
            runs.append(dict(merger.deltas()))
    for name in SHAPES:
        assert torch.equal(*(run[name] for run in runs))


def test_groups_have_settings_of_their_own(models):
    groups = {"encoder": {"density": 1.0}, "*.bias": {"exclude": True}, "convolutions": {"scaling": 0.2}}
    recipe = make_recipe("ties", {"density": 0.1, "scope": "tensor"}, groups=groups, scaling=0.9)
    plain = make_recipe("ties", {"density": 0.1, "scope": "tensor"})
    found, alone = merged(models, recipe), merged(models, plain)
    assert torch.equal(found["model.decoder.embed_tokens.weight"], alone["model.decoder.embed_tokens.weight"])
    assert (found["model.encoder.fc1.weight"] != 0).all()
    assert (alone["model.encoder.fc1.weight"] == 0).any()
    assert (found["model.encoder.fc1.bias"] == 0).all()
    with Merger(models["base"], vectors(models), recipe, WEIGHTS) as merger:
        scalings = {name: merger.scaling(name) for name in SHAPES}
    assert scalings == {
        "model.decoder.embed_tokens.weight": 0.9, "model.encoder.conv1.weight": 0.2, "model.encoder.fc1.bias": 0.0,
        "model.encoder.fc1.weight": 0.9, "nothing": 0.9, "scale": 0.9,
    }  # fmt: skip


def test_a_later_group_takes_back_what_an_earlier_one_leaves_out(models):
    groups: dict[str, Any] = {"encoder": {"exclude": True}, "*.fc1.weight": {"exclude": False}}
    found = merged(models, make_recipe("task_arithmetic", groups=groups))
    assert (found["model.encoder.fc1.weight"] != 0).any()
    assert (found["model.encoder.fc1.bias"] == 0).all()
    again = Recipe.model_validate_json(make_recipe("task_arithmetic", groups=groups).model_dump_json())
    assert again.groups["encoder"].exclude
    assert again.groups["*.fc1.weight"].exclude is False
    kept = make_recipe("ties", groups={"encoder": {"exclude": True}, "convolutions": {"scaling": 0.2}})
    found = merged(models, Recipe.model_validate_json(kept.model_dump_json()))
    assert (found["model.encoder.conv1.weight"] == 0).all()


def test_a_trim_of_the_whole_model_counts_groups_of_another_density_apart(models):
    groups = {"encoder": {"density": 0.5}, "scale": {"exclude": True}}
    found = merged(models, Recipe(steps=(Magnitude(density=0.01),), groups=groups))
    encoder = [name for name in SHAPES if "encoder" in name]
    deltas = {e: dict(extract(models["base"], models[e])) for e in EXPERTS}
    for names, density in ((encoder, 0.5), (["model.decoder.embed_tokens.weight", "nothing"], 0.01)):
        parts = [whole_model({n: deltas[e][n] for n in names}, Magnitude(density=density)) for e in EXPERTS]
        for name in names:
            expected = parts[0][name] + 0.7 * parts[1][name]
            assert torch.allclose(found[name], expected, rtol=1e-5, atol=1e-8)
    assert found["scale"] == 0


def test_pruned_files_are_taken_as_they_are_and_random_masks_go_by_expert(models, tmp_path):
    settings = PruneSettings(rank_ratio=0.5, density=0.1)
    files = {}
    for expert in EXPERTS:
        pruned = prune_task_vector(extract(models["base"], models[expert]), settings)
        files[expert] = write(tmp_path / f"{expert}.safetensors", pruned, base_digest="b", settings=settings)
    recipe = make_recipe("lors", prune=settings)
    with Merger(models["base"], files, recipe, WEIGHTS) as merger:
        found = dict(merger.deltas())
        assert merger.retained_energy == {}
    with Merger(models["base"], vectors(models), recipe, WEIGHTS) as merger:
        again = dict(merger.deltas())
        assert merger.retained_energy == pytest.approx({e: files[e].retained_energy for e in EXPERTS})
    for name in SHAPES:
        assert torch.equal(found[name], again[name])
    for scope in ("tensor", "model"):
        ties = [make_recipe("ties", {"scope": scope, "density": 0.5}, before=step) for step in ([], [Lors()])]
        whole, pruned_again = (merged_files(models, files, recipe) for recipe in ties)
        assert all(torch.equal(whole[name], pruned_again[name]) for name in SHAPES)
    same = {expert: TaskVector(models["base"], models["es"]) for expert in EXPERTS}
    with Merger(models["base"], same, make_recipe("dare_linear", {"density": 0.5}), WEIGHTS) as merger:
        embedding = dict(merger.deltas())["model.decoder.embed_tokens.weight"]
    es = same["es"].delta("model.decoder.embed_tokens.weight")
    ratios = (embedding / es).unique()  # neither, one or both of two masks that differ
    assert len({round(float(ratio), 3) for ratio in ratios}) == 4


def test_refuses_what_does_not_fit(models, tensor_folder, tmp_path):
    base = Checkpoint(tensor_folder("base", {"a": torch.ones(2), "b": torch.ones(2)}))
    less = Checkpoint(tensor_folder("less", {"a": torch.ones(2)}))
    wide = Checkpoint(tensor_folder("wide", {"a": torch.ones(2), "b": torch.ones(3)}))
    bad = Checkpoint(tensor_folder("bad", {"a": torch.ones(2), "b": torch.tensor([1.0, float("nan")])}))
    recipe = make_recipe("ties")
    with pytest.raises(CheckpointError, match="the task vector x has no tensor b"):
        Merger(base, {"x": TaskVector(less, less)}, recipe, {"x": 1.0})
    with pytest.raises(CheckpointError, match="less has no tensor b"):
        Merger(less, {"x": TaskVector(base, base)}, recipe, {"x": 1.0})
    path = tmp_path / "x.safetensors"
    write(path, prune_task_vector(extract(wide, wide), PruneSettings()), base_digest="", settings=None)
    with pytest.raises(CheckpointError, match=r"the tensor b is \[3\] in x but \[2\] in base"):
        Merger(base, {"x": DeltaFile(path)}, recipe, {"x": 1.0})
    with (
        pytest.raises(CheckpointError, match=r"bad: the tensor b holds NaN or infinity"),
        Merger(base, {"x": TaskVector(base, bad)}, recipe, {"x": 1.0}),
    ):
        pass
    with pytest.raises(InputError, match="belongs to the group 'encodr'"):
        Merger(base, {"x": TaskVector(base, base)}, make_recipe("ties", groups={"encodr": {}}), {"x": 1.0})
