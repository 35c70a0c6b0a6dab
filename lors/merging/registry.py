"""The merging methods as data: each a named point of the algebra in `recipe`, with formula and paper. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import pydantic
import yaml

from lors.errors import InputError
from lors.merging import recipe as r
from lors.merging.presets import PRESETS
from lors.prune_settings import PruneSettings
from lors.yaml_text import read_yaml

__all__ = [
    "METHODS",
    "STEPS",
    "Method",
    "allowed",
    "describe_field",
    "expert_weights",
    "get_method",
    "make_recipe",
    "make_step",
    "read_recipe",
    "with_scaling",
]


@dataclass(frozen=True, slots=True)
class Method:
    """A merging method: what each expert's deltas go through, how they become one, and the scaling coefficient."""

    name: str
    formula: str
    reference: str
    steps: tuple[r.Step, ...]
    combine: r.Combine
    scaling_default: float
    """The scaling coefficient where there is no validation data to search it on."""
    searches_scaling: bool = True
    """Whether the scaling coefficient is searched where there is validation data."""

    @property
    def prunes(self) -> bool:
        """Whether the deltas are pruned by LoRS first."""
        return any(isinstance(step, r.Lors) for step in self.steps)

    @property
    def parameters(self) -> dict[str, tuple[pydantic.fields.FieldInfo, Any]]:
        """Every setting of its steps and its combiner: what it is, and this method's default."""
        return {
            name: (field, getattr(part, name))
            for part in (*self.steps, self.combine)
            for name, field in type(part).model_fields.items()
            if name != "kind"
        }


METHODS: dict[str, Method] = {}
"""Every method by name."""


def _add(
    name: str, formula: str, reference: str, *parts: Any, scaling: float = 1.0, searches_scaling: bool = True
) -> None:
    *steps, combine = parts
    METHODS[name] = Method(name, formula, reference, tuple(steps), combine, scaling, searches_scaling)


# A choice of ours where there is no validation data: the field's defaults for sums are 0.3 (FusionBench) to 0.4.
_UNVALIDATED = 0.4
_DARE = "Yu et al. 2024, Language Models are Super Mario (DARE), arXiv 2311.03099, sec. 3"
_TIES = "Yadav et al. 2023, TIES-Merging, arXiv 2306.01708, sec. 4"
_LORS = "Zhao, Sun and Zhang 2025, Low-Rank and Sparse Model Merging, arXiv 2502.17380v3"

_add(
    "breadcrumbs",
    "base + lambda * sum_i(w_i * middle(delta_i)), middle: without the largest and the smallest magnitudes",
    "Davari and Belilovsky 2024, Model Breadcrumbs, arXiv 2312.06795, sec. 3",
    r.Breadcrumbs(),
    r.Sum(),
    scaling=_UNVALIDATED,
)
_add(
    "consensus",
    "base + lambda * sum_i(w_i * delta_i) where at least k TALL masks |delta_i| >= t * |sum - delta_i| agree",
    "Wang et al. 2024, Localizing Task Information (TALL masks), arXiv 2405.07813, sec. 4",
    r.Consensus(),
    scaling=_UNVALIDATED,
)
_add(
    "dare_linear",
    "base + lambda * sum_i(w_i * mask_i * delta_i / density), mask_i random",
    _DARE,
    r.Random(),
    r.Sum(),
    scaling=_UNVALIDATED,
)
_add(
    "dare_ties",
    "base + lambda * ties(mask_i * delta_i / density), mask_i random",
    f"{_DARE}; {_TIES}",
    r.Random(),
    r.Ties(),
)
_add(
    "iso_c",
    "base + lambda * mean(s) * U * Vh, with U * diag(s) * Vh = sum_i(w_i * delta_i)",
    "Marczak et al. 2025, No Task Left Behind: Isotropic Model Merging, arXiv 2502.04959, sec. 4.1",
    r.IsoC(),
)
_add(
    "iso_cts",
    "base + lambda * mean(s) * U * Vh over the sum's first directions and each expert's own first ones",
    "Marczak et al. 2025, No Task Left Behind: Isotropic Model Merging, arXiv 2502.04959, sec. 4.2",
    r.IsoCts(),
)
_add(
    "knots_ties",
    "base + lambda * U * ties(s * Vh_i), with U * diag(s) * [Vh_1 ... Vh_N] = [delta_1 ... delta_N]",
    "Stoica et al. 2024, Model Merging with SVD to Tie the Knots, arXiv 2410.19735, sec. 4",
    r.Knots(),
)
_add(
    "linear",
    "sum_i(w_i * model_i) / sum_i(w_i)",
    "Wortsman et al. 2022, Model soups, arXiv 2203.05482, sec. 2",
    r.Linear(),
    searches_scaling=False,
)
_add(
    "lors",
    "base + lambda * sum_i(w_i * pruned_i), pruned_i: delta_i as a low-rank plus a sparse part",
    _LORS,
    r.Lors(),
    r.Sum(),
    # A choice of ours: pruning keeps most of the energy, so the value of task arithmetic is the nearest known one.
    scaling=_UNVALIDATED,
)
_add(
    "low_rank",
    "base + lambda * sum_i(w_i * svd_r(delta_i)): an ablation of lors",
    _LORS,
    r.Lors(composition="low_rank"),
    r.Sum(),
    scaling=_UNVALIDATED,
)
_add(
    "magmax",
    "base + lambda * the delta of largest magnitude, entry by entry",
    "Marczak et al. 2024, MagMax, arXiv 2407.06322, sec. 4",
    r.MagMax(),
    scaling=_UNVALIDATED,
)
_add(
    "model_stock",
    "base + t * mean(delta_i), t = N * cos / (1 + (N - 1) * cos), cos: the mean cosine between deltas, by tensor",
    "Jang et al. 2024, Model Stock, arXiv 2403.19522, sec. 4",
    r.ModelStock(),
    searches_scaling=False,
)
_add(
    "slerp",
    "sin((1 - t) * a) / sin(a) * model_1 + sin(t * a) / sin(a) * model_2, a: the angle between them, by tensor",
    "Shoemake 1985, Animating Rotation with Quaternion Curves, sec. 3",
    r.Slerp(),
    searches_scaling=False,
)
_add(
    "sparse",
    "base + lambda * sum_i(w_i * top_k(delta_i)): an ablation of lors",
    _LORS,
    r.Lors(composition="sparse"),
    r.Sum(),
    scaling=_UNVALIDATED,
)
_add(
    "star",
    "base + lambda * sum_i(w_i * delta_i cut to its first directions, its nuclear norm restored) / sum_i(w_i)",
    "Lee et al. 2025, STAR: Spectral Truncation and Rescale for Model Merging, arXiv 2502.10339, sec. 3",
    r.Star(),
    r.Linear(),
)
_add(
    "task_arithmetic",
    "base + lambda * sum_i(w_i * delta_i)",
    "Ilharco et al. 2023, Editing Models with Task Arithmetic, arXiv 2212.04089, sec. 2",
    r.Sum(),
    scaling=_UNVALIDATED,
)
_add(
    "ties",
    "base + lambda * mean of the trimmed delta_i that have the elected sign, entry by entry",
    _TIES,
    r.Magnitude(),
    r.Ties(),
)
_add(
    "tsv_m",
    "base + lambda * U * diag(s) * Vh over all experts' first directions, U and Vh made orthogonal",
    "Gargiulo et al. 2025, Task Singular Vectors, arXiv 2412.00081, sec. 4",
    r.TsvM(),
)
_add(
    "weight_average",
    "base + sum_i(w_i * delta_i) / sum_i(w_i)",
    "Wortsman et al. 2022, Model soups, arXiv 2203.05482, sec. 2 (uniform soup)",
    r.Linear(),
    searches_scaling=False,
)


STEPS: dict[str, r.Step] = {
    step.kind: step for step in (r.Lors(), r.Magnitude(), r.Random(), r.Breadcrumbs(), r.Star())
}
"""Every prune step by name, with its defaults."""


def describe_field(field: pydantic.fields.FieldInfo) -> str:
    """What a setting means and what it may be."""
    able = allowed(field)
    return " ".join((field.description or "").split()) + (f" [{able}]" if able else "")


def allowed(field: pydantic.fields.FieldInfo) -> str:
    """What a setting may be: its choices or its range; empty where anything of its type goes."""
    inner = [part for part in get_args(field.annotation) if get_origin(part) is Annotated]  # of `Annotated[..] | None`
    bounds = {"gt": "above {}", "ge": "from {}", "lt": "below {}", "le": "up to {}"}
    parts = [deeper for part in (*field.metadata, *(m for i in inner for m in get_args(i)[1:]))
             for deeper in getattr(part, "metadata", None) or [part]]  # fmt: skip
    limits = [
        text.format(getattr(part, bound))
        for part in parts
        for bound, text in bounds.items()
        if getattr(part, bound, None) is not None
    ]
    choices = (
        ["true", "false"]
        if field.annotation in (bool, bool | None)
        else [c for c in get_args(field.annotation) if isinstance(c, str)]
    )
    return " | ".join(choices) or ", ".join(limits)


def make_step(kind: str, values: Mapping[str, Any]) -> r.Step:
    """A prune step. Raises InputError that names what is wrong and what is known."""
    if kind not in STEPS:
        raise InputError(f"there is no prune step {kind!r}; did you mean {_nearest(kind, STEPS)}? ({', '.join(STEPS)})")
    model = type(STEPS[kind])
    try:
        made: r.Step = model.model_validate(dict(values))
        return made
    except pydantic.ValidationError as error:
        raise InputError(_sentence(error, kind, model.model_fields)) from error


def read_recipe(path: Path, scaling: float | None = None) -> r.Recipe:
    """The recipe of a YAML or JSON file, with another scaling coefficient where one is given.

    The file is a whole recipe, as a model card has it, or short: a method with its parameters, scaling and groups.
    Raises InputError.
    """
    try:
        content = read_yaml(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        raise InputError(f"the recipe {path} cannot be read ({reason}); check the file") from error
    if not content or not isinstance(content, dict):
        found = "empty" if content is None else f"no mapping but {content!r}"
        raise InputError(f"the recipe {path} is {found:.80}; write `method: ties`, say, and its parameters below")
    try:
        _refuse_switches(content)
        recipe = _recipe_of(content)
    except pydantic.ValidationError as error:
        parts: list[Any] = [r.Recipe, r.Group, *map(type, STEPS.values())]
        raise InputError(
            f"the recipe {path}: {_sentence(error, 'it', (f for p in parts for f in p.model_fields))}"
        ) from error
    except InputError as error:
        raise InputError(f"the recipe {path}: {error}") from error
    return with_scaling(recipe, scaling)


def _recipe_of(content: Mapping[str, Any]) -> r.Recipe:
    method = str(content.get("method", "custom"))
    if method == "custom":
        return r.Recipe.model_validate(content)
    chosen = get_method(method)
    if {"steps", "combine"} & content.keys():
        whole = {"steps": chosen.steps, "combine": chosen.combine, "scaling": chosen.scaling_default}
        return r.Recipe.model_validate({**whole, **content})
    short = r.Recipe.model_validate({key: content[key] for key in ("scaling", "groups") if key in content})
    values = {str(key): value for key, value in content.items() if key not in ("method", "scaling", "groups")}
    return make_recipe(method, values, scaling=short.scaling if "scaling" in content else None, groups=short.groups)


_PARTS: list[type[pydantic.BaseModel]] = [
    r.Group,
    *(type(part) for part in (*STEPS.values(), *(method.combine for method in METHODS.values()))),
]
_SWITCHES = {n for part in _PARTS for n, field in part.model_fields.items() if field.annotation in (bool, bool | None)}


def _refuse_switches(content: Any) -> None:
    """Raises InputError for a number or a word that YAML read as true or false: on, off, yes, no."""
    for key, value in content.items() if isinstance(content, dict) else enumerate(content):
        if isinstance(value, bool) and key not in _SWITCHES:
            raise InputError(f"{key} is {str(value).lower()}; write a number, or a word in quotes (a bare on is true)")
        if isinstance(value, dict | list):
            _refuse_switches(value)


def with_scaling(recipe: r.Recipe, scaling: float | None) -> r.Recipe:
    """The recipe with another scaling coefficient, where one is given. Raises InputError where it is not finite."""
    if scaling is None:
        return recipe
    if not isfinite(scaling):
        raise InputError(f"the scaling coefficient is {scaling}; give a finite number")
    return recipe.model_copy(update={"scaling": scaling})


def _sentence(error: pydantic.ValidationError, where: str, known: Iterable[str]) -> str:
    first = error.errors()[0]
    place, kind = ".".join(map(str, first["loc"])), first["type"]
    if kind == "extra_forbidden":
        near = _nearest(str(first["loc"][-1]), known)
        return f"{place} is no setting of {where}; see `lors merge --list` (did you mean {near}?)"
    if kind == "union_tag_invalid":
        tags = first["ctx"]["expected_tags"].replace("'", "")
        near = _nearest(str(first["ctx"]["tag"]), tags.split(", "))
        return f"{place} is of no known kind; did you mean {near}? ({tags})"
    if kind == "value_error":
        return f"{place or where}: {first['msg'].removeprefix('Value error, ')}"
    expected = re.sub(r", (unable|got) .*", "", first["msg"])
    return f"{place or where}: {expected}, not {first['input']!r}"


def get_method(name: str) -> Method:
    """Raises InputError, with the nearest name, where there is no such method."""
    if name not in METHODS:
        raise InputError(
            f"there is no merging method {name!r}; did you mean {_nearest(name, METHODS)}? "
            f"(there are: {', '.join(METHODS)})"
        )
    return METHODS[name]


def make_recipe(
    method: str,
    parameters: Mapping[str, Any] | None = None,  # of the method, by name
    *,
    before: Iterable[r.Step] = (),  # steps that come before the method's own
    prune: PruneSettings | None = None,  # of every LoRS step of the method
    scaling: float | None = None,  # the method's default where None
    groups: Mapping[str, r.Group | Mapping[str, Any]] | None = None,
    like: str | None = None,  # a library whose definition of the method is taken: see `presets`
) -> r.Recipe:
    """A method with its parameters put in. Raises InputError that names the wrong one and what is known."""
    chosen = get_method(method)
    values = dict(parameters or {})
    if like is not None:
        if like not in PRESETS or method not in PRESETS[like]:
            able = PRESETS.get(like, PRESETS)
            raise InputError(
                f"like {like}: there is no preset {'of ' + method if like in PRESETS else 'of that name'}; "
                f"there are {', '.join(able)}"
            )
        preset = dict(PRESETS[like][method])
        preset_scaling = preset.pop("scaling", None)
        values = {**preset, **values}
        scaling = preset_scaling if scaling is None else scaling
    if prune is not None and not chosen.prunes:
        raise InputError(
            f"the method {method} does not prune by LoRS, so pruning settings have no effect; "
            f"use lors, put a LoRS step before it, or leave them out"
        )
    for name in values:
        if name not in chosen.parameters:
            known = ", ".join(chosen.parameters) or "none"
            near = f", did you mean {_nearest(name, chosen.parameters)!r}?" if chosen.parameters else ";"
            raise InputError(f"{method} has no parameter {name!r}{near} (its parameters: {known})")
    steps = [_pruning(step, prune) if prune and isinstance(step, r.Lors) else step for step in chosen.steps]
    try:
        parts = [_changed(part, values) for part in (*steps, chosen.combine)]
    except pydantic.ValidationError as error:
        raise InputError(_sentence(error, method, chosen.parameters)) from error
    own = {name: _group(name, values) for name, values in (groups or {}).items()}
    recipe = r.Recipe(method=method, steps=(*before, *parts[:-1]), combine=parts[-1], groups=own)
    return with_scaling(recipe, chosen.scaling_default if scaling is None else scaling)


def _group(name: str, values: r.Group | Mapping[str, Any]) -> r.Group:
    try:
        return r.Group.model_validate(values)
    except pydantic.ValidationError as error:
        raise InputError(f"the group {name}: {_sentence(error, 'a group', r.Group.model_fields)}") from error


def _pruning(step: r.Lors, prune: PruneSettings) -> r.Lors:
    """LoRS by these settings; the ablations keep what they are."""
    settings = prune.model_dump()
    if step.composition != "additive":
        settings |= {"composition": step.composition, "refinements": 0}
    return r.Lors(**settings)


def _changed(part: Any, values: Mapping[str, Any]) -> Any:
    own = {name: value for name, value in values.items() if name in type(part).model_fields}
    return type(part).model_validate({**part.model_dump(), **own}) if own else part


def _nearest(name: str, known: Iterable[str]) -> str:
    return get_close_matches(name, list(known), n=1, cutoff=0)[0]


def expert_weights(experts: Mapping[str, object], weights: Mapping[str, float] | None) -> dict[str, float]:
    """One weight an expert, sorted by id; 1 where none is given. Raises InputError for an id that is no expert's."""
    weights = weights or {}
    if unknown := sorted(weights.keys() - experts.keys()):
        raise InputError(
            f"the weight of {unknown[0]!r} belongs to no expert; the experts are {', '.join(sorted(experts))}"
        )
    if bad := sorted(name for name, weight in weights.items() if not isfinite(weight)):
        raise InputError(f"the weight of {bad[0]!r} is {weights[bad[0]]}; give a finite number")
    return {name: float(weights.get(name, 1.0)) for name in sorted(experts)}
