from __future__ import annotations

import json
from pathlib import Path

import pytest

from lors.errors import InputError
from lors.merging import METHODS, get_method, make_recipe
from lors.merging.combiners import Fold, Joint
from lors.merging.parts import combiner
from lors.merging.presets import PRESETS
from lors.merging.recipe import Group, Lors, Magnitude, Recipe, Ties
from lors.merging.registry import STEPS, describe_field, expert_weights, make_step, read_recipe
from lors.prune_settings import PruneSettings


def test_every_method_of_the_field_is_there():
    assert list(METHODS) == sorted(METHODS)
    assert METHODS.keys() == {
        "weight_average", "linear", "task_arithmetic", "slerp", "ties", "dare_linear", "dare_ties", "breadcrumbs",
        "magmax", "model_stock", "consensus", "tsv_m", "iso_c", "iso_cts", "star", "knots_ties", "low_rank", "sparse",
        "lors",
    }  # fmt: skip
    for name, method in METHODS.items():
        assert method.name == name
        assert "arXiv" in method.reference or name == "slerp"
        assert isinstance(combiner(method.combine), Fold | Joint)
        for field, _ in method.parameters.values():
            assert describe_field(field)
        recipe = make_recipe(name)
        assert (recipe.method, recipe.scaling) == (name, method.scaling_default)
        assert Recipe.model_validate(json.loads(recipe.model_dump_json())) == recipe
    assert [name for name, method in METHODS.items() if method.prunes] == ["lors", "low_rank", "sparse"]
    assert [name for name, method in METHODS.items() if not method.searches_scaling] == [
        "linear", "model_stock", "slerp", "weight_average",
    ]  # fmt: skip


def test_a_method_has_each_parameter_once():
    for method in METHODS.values():
        parts = [type(part).model_fields.keys() - {"kind"} for part in (*method.steps, method.combine)]
        assert sum(map(len, parts)) == len(method.parameters)


def test_parameters_go_to_the_part_that_has_them():
    recipe = make_recipe("ties", {"density": 0.3, "election": "count"}, before=[Lors(rank_ratio=0.2)], scaling=0.7)
    assert recipe.steps == (Lors(rank_ratio=0.2), Magnitude(density=0.3))
    assert recipe.combine == Ties(election="count")
    assert recipe.scaling == 0.7


def test_pruning_settings_go_into_every_lors_step():
    settings = PruneSettings(rank_ratio=0.3, refinements=2, groups={"encoder": {"density": 0.5}})
    assert make_recipe("lors", prune=settings).pruning == settings
    ablation = make_recipe("sparse", prune=settings).pruning
    assert ablation is not None
    assert (ablation.composition, ablation.refinements, ablation.rank_ratio) == ("sparse", 0, 0.3)
    groups = {"decoder": {"rank_ratio": 0.05, "scaling": 0.2}, "vectors": {"exclude": True}}
    recipe = make_recipe("lors", prune=settings, groups=groups)
    assert recipe.pruning is not None
    shape = (64, 64)
    assert recipe.pruning.of("model.encoder.fc1.weight", shape) == (0.3, 0.5)
    assert recipe.pruning.of("model.decoder.fc1.weight", shape) == (0.05, 0.1)
    assert recipe.scaling_of("model.decoder.fc1.weight", shape) == 0.2
    assert recipe.scaling_of("model.decoder.fc1.weight", shape, 0.9) == 0.2
    assert recipe.scaling_of("model.encoder.fc1.weight", shape, 0.9) == 0.9
    assert recipe.scaling_of("model.encoder.fc1.bias", (64,)) == 0.0
    assert make_recipe("ties").pruning is None


def test_presets_hold_what_exists_and_can_be_changed():
    for like, methods in PRESETS.items():
        for method in methods:
            recipe = make_recipe(method, like=like)
            assert recipe.scaling == PRESETS[like][method].get("scaling", METHODS[method].scaling_default)
    recipe = make_recipe("ties", {"density": 0.5}, like="peft", scaling=0.1)
    assert recipe.steps == (Magnitude(density=0.5, scope="tensor", count="down"),)
    assert recipe.combine == Ties(election="unweighted", divisor="count", tie="positive")
    assert recipe.scaling == 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("task_arithmetics",), r"no merging method 'task_arithmetics'; did you mean task_arithmetic\?"),
        (
            ("ties", {"densty": 1}),
            r"ties has no parameter 'densty', did you mean 'density'\? \(its parameters: density",
        ),
        (("task_arithmetic", {"density": 1}), r"task_arithmetic has no parameter 'density'.*parameters: none"),
        (("ties", {"density": 0}), "density: Input should be greater than 0, not 0"),
        (("ties", {"density": float("nan")}), "density: Input should be a finite number"),
        (("ties", {"election": "majority"}), "election: Input should be 'unweighted', 'weighted' or 'count'"),
        (("lors", {"refinements": 1, "composition": "sparse"}), "refinements need the composition additive"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(InputError, match=message):
        make_recipe(*arguments)


def test_refuses_options():
    with pytest.raises(InputError, match="ties does not prune by LoRS"):
        make_recipe("ties", prune=PruneSettings())
    with pytest.raises(InputError, match="coefficient is inf"):
        make_recipe("ties", scaling=float("inf"))
    with pytest.raises(InputError, match="there is no preset of iso_c; there are breadcrumbs"):
        make_recipe("iso_c", like="mergekit")
    with pytest.raises(InputError, match="no preset of that name; there are mergekit, peft, fusionbench"):
        make_recipe("ties", like="mergkit")
    with pytest.raises(InputError, match="scal"):
        make_recipe("ties", groups={"encoder": {"scal": 1}})
    with pytest.raises(InputError, match=r"no prune step 'magnitud'; did you mean magnitude"):
        make_step("magnitud", {})
    with pytest.raises(InputError, match="densty is no setting of magnitude; see `lors merge --list`"):
        make_step("magnitude", {"densty": 1})
    assert make_step("lors", {"rank_ratio": 0.5}) == Lors(rank_ratio=0.5)
    assert STEPS.keys() == {"lors", "magnitude", "random", "breadcrumbs", "star"}
    with pytest.raises(InputError, match="no merging method"):
        get_method("")


def test_a_recipe_is_read_from_a_file(tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    path.write_text("steps: [{kind: lors, rank_ratio: 0.05}]\ncombine: {kind: ties}\nscaling: 0.3\n")
    assert read_recipe(path) == Recipe(steps=(Lors(rank_ratio=0.05),), combine=Ties(), scaling=0.3)
    assert read_recipe(path, 0.5).scaling == 0.5
    path.write_text(make_recipe("dare_ties", groups={"encoder": Group(scaling=0.2)}).model_dump_json())
    assert read_recipe(path) == make_recipe("dare_ties", groups={"encoder": Group(scaling=0.2)})
    for text, message in [
        ("steps: [{kind: lorz}]", r"the recipe .*steps.0"),
        ("stepz: []", r"stepz is no setting of it"),
        ("a: [", r"cannot be read"),
        ("- 1", r"the recipe"),
    ]:
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            read_recipe(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_recipe(tmp_path / "nothing.yaml")


@pytest.mark.parametrize("method", METHODS)
def test_every_recipe_is_read_back_from_a_card(method, tmp_path: Path):
    recipe = make_recipe(method, groups={"encoder": {"exclude": True, "scaling": 0.5}})
    (tmp_path / "recipe.json").write_text(recipe.model_dump_json())
    assert read_recipe(tmp_path / "recipe.json") == recipe


def test_switches_are_read_from_a_file(tmp_path: Path):
    (tmp_path / "recipe.yaml").write_text("method: model_stock\nclamp: false\n")
    assert read_recipe(tmp_path / "recipe.yaml") == make_recipe("model_stock", {"clamp": False})


def test_weights():
    experts = {"fr": 0, "es": 0}
    assert list(expert_weights(experts, {"fr": 2}).items()) == [("es", 1.0), ("fr", 2.0)]
    with pytest.raises(InputError, match="'de' belongs to no expert; the experts are es, fr"):
        expert_weights(experts, {"de": 1})
    with pytest.raises(InputError, match="'es' is nan"):
        expert_weights(experts, {"es": float("nan")})


def test_reading_the_registry_needs_no_torch():
    import subprocess
    import sys

    code = "import sys, lors.merging, lors.config, flows.cli; print('torch' in sys.modules or 'scipy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
