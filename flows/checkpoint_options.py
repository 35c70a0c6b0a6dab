"""The options of the commands on checkpoints: what the parser takes, and what it means. No Prefect here."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from lors.errors import ConfigError, InputError

__all__ = [
    "EXPERT",
    "add_base",
    "add_experts",
    "add_force",
    "add_merge",
    "add_out",
    "add_pruning",
    "add_workers",
    "chooses_recipe",
    "experts_of",
    "given_pruning",
    "pruning_of",
    "recipe_of",
    "removed_of",
    "weights_of",
]

EXPERT = "a model folder, a Hugging Face id or a compact expert (.safetensors)"


def add_base(command: Any, required: bool = True) -> None:
    command.add_argument(
        "--base", required=required, metavar="MODEL", help="what the experts were fine-tuned from: folder or hub id"
    )


def add_experts(command: Any) -> None:
    command.add_argument("--expert", action="append", default=[], metavar="[ID=]MODEL", help=f"{EXPERT}; repeat")


def add_out(command: Any, what: str, required: bool = True) -> None:
    command.add_argument(
        "--out", type=Path, required=required, metavar="FOLDER", help=f"{what}; must not exist or be empty"
    )


def add_force(command: Any) -> None:
    command.add_argument("--force", action="store_true", help="take a compact expert of another base all the same")


def add_workers(command: Any) -> None:
    command.add_argument("--workers", type=_positive, metavar="N", help="threads (default: the cores of this process)")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


def add_pruning(command: Any) -> None:
    group = command.add_argument_group("LoRS pruning")
    group.add_argument("--composition", choices=("additive", "sequential", "low_rank", "sparse"))
    group.add_argument("--rank-ratio", type=float, metavar="R", help="rank over the shorter side, in (0, 1]")
    group.add_argument("--density", type=float, metavar="D", help="fraction of entries that the sparse part keeps")
    group.add_argument("--refinements", type=int, metavar="K", help="alternations of both fits (additive only)")
    group.add_argument("--vectors", choices=("keep", "drop"), help="tensors of fewer than two dimensions")
    group.add_argument("--include", action="append", metavar="GLOB", help="prune only these parameters; repeat")
    group.add_argument("--exclude", action="append", metavar="GLOB", help="keep these parameters' deltas whole; repeat")


def add_merge(merge: Any) -> None:
    merge.add_argument("--list", action="store_true", help="list methods, steps, groups and presets, and stop")
    add_base(merge, required=False)
    add_experts(merge)
    add_out(merge, "the merged model", required=False)
    merge.add_argument("--method", help="see --list (default: lors)")
    merge.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a parameter of the method")
    merge.add_argument("--like", choices=("mergekit", "peft", "fusionbench"), help="mean by it what that library does")
    merge.add_argument(
        "--prune", action="append", default=[], metavar="STEP[:NAME=VALUE,...]", help="a step before the method's own"
    )
    merge.add_argument(
        "--group",
        action="append",
        default=[],
        metavar="GROUP:NAME=VALUE,...",
        help="other settings for some parameters",
    )
    merge.add_argument("--recipe", type=Path, metavar="FILE", help="method, steps, groups and all from a YAML file")
    merge.add_argument("--scaling", type=float, metavar="LAMBDA", help="scaling coefficient (default: the method's)")
    merge.add_argument("--weight", action="append", default=[], metavar="ID=W", help="merge weight of an expert")
    merge.add_argument("--into", type=Path, metavar="FILE", help="add the experts to this accumulator (.safetensors)")
    merge.add_argument(
        "--remove", action="append", default=[], metavar="ID[=MODEL]", help="take an expert out of the accumulator"
    )
    add_force(merge)
    add_workers(merge)
    add_pruning(merge)


def experts_of(given: Sequence[str]) -> dict[str, str]:
    experts: dict[str, str] = {}
    for text in given:
        name, equals, place = text.partition("=")
        if not equals or "/" in name:  # a path, which may hold an = itself: runs/lr=1e-5/es
            name, place = Path(text).name.removesuffix(".safetensors"), text
        if not name or not place:
            raise InputError(f"--expert {text!r} is not ID=MODEL or MODEL, such as es=runs/es")
        if name in experts:
            raise InputError(f"--expert: two experts are named {name!r}; name them otherwise, such as {name}2={place}")
        experts[name] = place
    return experts


def weights_of(given: Sequence[str]) -> dict[str, float]:
    weights = {}
    for text in given:
        name, _, value = text.partition("=")
        try:
            weights[name] = float(value)
        except ValueError as error:
            raise InputError(f"--weight {text!r} is not ID=NUMBER, such as es=0.5") from error
    return weights


_PATTERNS = ("include", "exclude")
_PRUNING = ("composition", "rank_ratio", "density", "refinements", "vectors", *_PATTERNS)


def given_pruning(options: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name in _PRUNING if (value := getattr(options, name)) is not None}


def pruning_of(options: argparse.Namespace) -> Any:
    import pydantic

    from lors.prune_settings import PruneSettings

    given = given_pruning(options)
    try:
        return PruneSettings(**given) if given else None
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ")
        if first["loc"]:
            message = f"--{str(first['loc'][0]).replace('_', '-')} {first['input']}: {message}"
        raise ConfigError(message) from error


def chooses_recipe(options: argparse.Namespace) -> bool:
    return bool(
        options.method or options.set or options.like or options.prune or options.group or options.recipe
        or given_pruning(options)
    )  # fmt: skip


def recipe_of(options: argparse.Namespace) -> Any:
    from lors.merging.registry import make_recipe, make_step, read_recipe

    if options.recipe is not None:
        if options.method or options.set or options.like or options.prune or options.group or given_pruning(options):
            raise InputError(
                "--recipe holds the method and all its settings; leave the others out (--scaling may stay)"
            )
        return _all_used(read_recipe(options.recipe, options.scaling))
    method = options.method or "lors"
    recipe = make_recipe(
        method,
        _assigned(options.set, "--set"),
        before=[make_step(kind, values) for kind, values in map(_step, options.prune)],
        prune=pruning_of(options),
        scaling=options.scaling,
        groups=_groups(options.group),
        like=options.like,
    )
    return _all_used(recipe)


def _all_used(recipe: Any) -> Any:
    """The recipe. Raises InputError where a group sets what none of its parts has."""
    known = {name for part in (*recipe.steps, recipe.combine) for name in type(part).model_fields}
    for name, group in recipe.groups.items():
        for setting in ("rank_ratio", "density"):
            if getattr(group, setting) is not None and setting not in known:
                raise InputError(
                    f"the group {name}: {recipe.method} has no {setting}, so it would change nothing; leave it out, "
                    "or put a step that has one before it (see `lors merge --list`)"
                )
    return recipe


def _step(text: str, lists: Collection[str] = _PATTERNS) -> tuple[str, dict[str, Any]]:
    """Of `lors:rank_ratio=0.1,density=0.05`: lors, and its settings."""
    name, _, settings = text.partition(":")
    return name, _assigned([part for part in settings.split(",") if part], text, lists)


def _groups(given: Sequence[str]) -> dict[str, dict[str, Any]]:
    groups: dict[str, dict[str, Any]] = {}
    for text in given:
        name, settings = _step(text, ())  # its exclude is true or false
        if not name or not settings:
            raise InputError(f"--group {text!r} is not GROUP:NAME=VALUE, such as encoder:scaling=0.3")
        groups[name] = {**groups.pop(name, {}), **settings}
    return groups


def _assigned(given: Sequence[str], where: str, lists: Collection[str] = _PATTERNS) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name or not value:
            raise InputError(f"{where}: {text!r} is not NAME=VALUE, such as density=0.2")
        # The settings read the text: YAML would take on for true and 1e-3 for a word.
        values[name] = [*values.get(name, []), value] if name in lists else value
    return values


def removed_of(given: Sequence[str]) -> dict[str, str | None]:
    removed: dict[str, str | None] = {}
    for text in given:
        name, equals, place = text.partition("=")
        if not name or (equals and not place):
            raise InputError(f"--remove {text!r} is not ID or ID=MODEL, such as es or es=runs/es")
        removed[name] = place or None
    return removed
