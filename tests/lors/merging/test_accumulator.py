from __future__ import annotations

import itertools
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from lors.checkpoint import Checkpoint
from lors.errors import CheckpointError, InputError, StepFailedError
from lors.merging import METHODS, make_recipe
from lors.merging.accumulator import Accumulator, accumulate, write_accumulated
from lors.merging.folders import merge_folders
from lors.merging.recipe import Lors

FOLDS = ["breadcrumbs", "dare_linear", "dare_ties", "iso_c", "linear", "lors", "low_rank", "magmax", "sparse", "star",
         "task_arithmetic", "ties", "weight_average"]  # fmt: skip


@pytest.fixture(scope="module")
def models(tiny_whisper_folder) -> dict[str, Path]:
    return {name: tiny_whisper_folder(seed) for seed, name in enumerate(("base", "de", "es", "fr"))}


def experts_of(models: dict[str, Path], *names: str) -> dict[str, Path]:
    return {name: models[name] for name in names}


def weights_of(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("method", FOLDS)
def test_one_at_a_time_is_byte_for_byte_all_at_once(models, tmp_path, method):
    recipe, base = make_recipe(method), Checkpoint(models["base"])
    path = tmp_path / "all.safetensors"
    weights = {"de": 2.0, "es": 1.0, "fr": 0.5}
    for name in ("fr", "de", "es"):
        state = accumulate(path, base, recipe, add={name: models[name]}, weights={name: weights[name]})
    assert state.weights == weights
    write_accumulated(state, base, tmp_path / "one")
    result = merge_folders(
        models["base"], experts_of(models, "de", "es", "fr"), tmp_path / "all", recipe, weights=weights
    )
    assert weights_of(tmp_path / "one") == weights_of(tmp_path / "all")
    assert Checkpoint(tmp_path / "one").digest() == result.digest
    if method == "magmax":
        with pytest.raises(InputError, match="magmax cannot take an expert out"):
            accumulate(path, base, recipe, remove={"de": None})
        return
    state = accumulate(path, base, recipe, remove={"de": None})
    write_accumulated(state, base, tmp_path / "less", scaling=0.3)
    less = make_recipe(method, scaling=0.3)
    merge_folders(models["base"], experts_of(models, "es", "fr"), tmp_path / "two", less, weights={"fr": 0.5})
    assert weights_of(tmp_path / "less") == weights_of(tmp_path / "two")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["all", "all.safetensors", "less", "one", "two"]


def test_any_order_gives_the_same_bytes_and_no_other_expert_is_read(models, tmp_path):
    base, recipe = Checkpoint(models["base"]), make_recipe("ties", before=[Lors(rank_ratio=0.3)])
    contents = set()
    for number, order in enumerate(itertools.permutations(("de", "es", "fr"))):
        path = tmp_path / f"{number}.safetensors"
        for name in order:
            lent = tmp_path / name
            shutil.copytree(models[name], lent)
            state = accumulate(path, base, recipe, add={name: lent})
            shutil.rmtree(lent)  # what was added is never needed again
        write_accumulated(state, base, tmp_path / f"out{number}")
        contents.add(weights_of(tmp_path / f"out{number}"))
    assert len(contents) == 1


def test_one_expert_takes_the_place_of_another(models, tmp_path):
    base, recipe, path = Checkpoint(models["base"]), make_recipe("task_arithmetic"), tmp_path / "all.safetensors"
    accumulate(path, base, recipe, add={"es": models["fr"], "de": models["de"]})
    state = accumulate(path, base, recipe, add={"es": models["es"]}, remove={"es": models["fr"]})
    assert state.experts["es"]["source"] == str(models["es"])
    write_accumulated(state, base, tmp_path / "one")
    merge_folders(models["base"], experts_of(models, "de", "es"), tmp_path / "two", recipe)
    assert weights_of(tmp_path / "one") == weights_of(tmp_path / "two")


def test_groups_left_out_stay_as_in_the_base(models, tmp_path):
    base, path = Checkpoint(models["base"]), tmp_path / "all.safetensors"
    recipe = make_recipe("iso_c", groups={"encoder": {"exclude": True}, "embeddings": {"scaling": 0.5}})
    state = accumulate(path, base, recipe, add=experts_of(models, "es", "fr"))
    write_accumulated(state, base, tmp_path / "one")
    merge_folders(models["base"], experts_of(models, "es", "fr"), tmp_path / "two", recipe)
    assert weights_of(tmp_path / "one") == weights_of(tmp_path / "two")
    written = Checkpoint(tmp_path / "one")
    for name in base.names:
        if base.tensor(name).std() > 0.001:  # the same in all models otherwise
            assert torch.equal(written.tensor(name), base.tensor(name)) == (".encoder." in name)


def test_two_at_a_time_both_go_in(models, tmp_path):
    base, recipe, path = Checkpoint(models["base"]), make_recipe("ties"), tmp_path / "all.safetensors"
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda name: accumulate(path, base, recipe, add={name: models[name]}), ("de", "es", "fr")))
    state = Accumulator(path)
    assert state.weights.keys() == {"de", "es", "fr"}
    write_accumulated(state, base, tmp_path / "one")
    merge_folders(models["base"], experts_of(models, "de", "es", "fr"), tmp_path / "all", recipe)
    assert weights_of(tmp_path / "one") == weights_of(tmp_path / "all")
    assert not list(tmp_path.glob(".*"))


def test_who_lost_the_lock_meanwhile_changes_nothing(models, tmp_path):
    base, recipe, path = Checkpoint(models["base"]), make_recipe("ties"), tmp_path / "all.safetensors"
    accumulate(path, base, recipe, add=experts_of(models, "de"))
    before, lock = path.read_bytes(), tmp_path / ".all.safetensors.lock"

    def taken_over(done: int, total: int) -> None:
        if done == total:
            (tmp_path / "new").write_text("{}")
            (tmp_path / "new").rename(lock)

    with pytest.raises(StepFailedError, match=r"lost the accumulator .* run the same command again"):
        accumulate(path, base, recipe, add=experts_of(models, "es"), on_progress=taken_over)
    assert path.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == [lock.name, path.name]


def test_a_scaling_of_0_leaves_nothing_out_of_the_state(models, tmp_path):
    base, path = Checkpoint(models["base"]), tmp_path / "new" / "all.safetensors"
    recipe = make_recipe("ties", before=[Lors(rank_ratio=0.5)], scaling=0)
    state = accumulate(path, base, recipe, add=experts_of(models, "es", "fr"))
    write_accumulated(state, base, tmp_path / "zero")
    assert weights_of(tmp_path / "zero") == weights_of(models["base"])
    write_accumulated(state, base, tmp_path / "half", scaling=0.5)
    half = recipe.model_copy(update={"scaling": 0.5})
    merge_folders(models["base"], experts_of(models, "es", "fr"), tmp_path / "all", half)
    assert weights_of(tmp_path / "half") == weights_of(tmp_path / "all")


def test_without_any_expert_it_is_the_base(models, tmp_path):
    base, recipe, path = Checkpoint(models["base"]), make_recipe("iso_c"), tmp_path / "all.safetensors"
    accumulate(path, base, recipe, add=experts_of(models, "es"))
    write_accumulated(accumulate(path, base, recipe, remove={"es": None}), base, tmp_path / "none")
    assert weights_of(tmp_path / "none") == weights_of(models["base"])


def test_refuses_and_leaves_the_accumulator_as_it_was(models, tmp_path, tiny_whisper_folder):
    base, recipe, path = Checkpoint(models["base"]), make_recipe("task_arithmetic"), tmp_path / "all.safetensors"
    accumulate(path, base, recipe, add=experts_of(models, "es"))
    before = path.read_bytes()
    for change, error, message in [
        ({"add": {"es": models["fr"]}}, InputError, "the expert 'es' is in .* already"),
        ({"remove": {"it": None}}, InputError, r"there is no expert 'it' in .* \(there are: es\)"),
        ({"remove": {"es": models["fr"]}}, CheckpointError, "is not the one in"),
        ({"add": {"x": tiny_whisper_folder(d_model=24)}}, CheckpointError, "give an expert that was fine-tuned"),
        ({"add": {"x": tmp_path / "nothing"}}, CheckpointError, "is not a folder"),
    ]:
        with pytest.raises(error, match=message):
            accumulate(path, base, recipe, **change)
    with pytest.raises(CheckpointError, match="is of another base"):
        accumulate(path, Checkpoint(models["fr"]), recipe, add=experts_of(models, "de"))
    with pytest.raises(InputError, match="was begun with another recipe, of task_arithmetic"):
        accumulate(path, base, make_recipe("ties"), add=experts_of(models, "de"))
    with pytest.raises(InputError, match=r"slerp needs all experts together.* task_arithmetic"):
        accumulate(tmp_path / "new.safetensors", base, make_recipe("slerp"), add=experts_of(models, "es"))
    with pytest.raises(CheckpointError, match="is no accumulator"):
        Accumulator(models["base"] / "model.safetensors")
    path.write_bytes(before[:-9])
    with pytest.raises(CheckpointError, match="corrupt or cut off"):
        Accumulator(path)
    path.write_bytes(before)
    assert Accumulator(path).weights == {"es": 1.0}
    assert [p.name for p in tmp_path.iterdir()] == ["all.safetensors"]


def test_the_methods_that_fold(models):
    from lors.merging.combiners import Fold
    from lors.merging.parts import combiner

    assert [name for name, method in METHODS.items() if isinstance(combiner(method.combine), Fold)] == FOLDS
