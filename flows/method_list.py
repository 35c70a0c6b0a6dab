"""`lors merge --list`: the methods, steps, groups and presets. No Prefect here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

__all__ = ["list_methods"]


def list_methods(as_json: bool) -> int:
    from lors.groups import GROUPS
    from lors.merging.presets import PRESETS
    from lors.merging.registry import METHODS, STEPS, allowed

    if as_json:
        rows = [
            {
                "name": method.name,
                "formula": method.formula,
                "reference": method.reference,
                "scaling": method.scaling_default,
                "parameters": {
                    name: {"default": default, "allowed": allowed(field), "meaning": _one_line(field.description)}
                    for name, (field, default) in method.parameters.items()
                },
            }
            for method in METHODS.values()
        ]
        print(json.dumps(rows, indent=2, default=str))
        return 0
    for method in METHODS.values():
        print(f"{method.name}\n    {method.formula}\n    {method.reference}")
        print(f"    scaling coefficient: {method.scaling_default:g}")
        _print_fields(method.parameters)
    print("\nsteps that may come before any method (--prune STEP:NAME=VALUE,...)")
    for name, step in STEPS.items():
        print(f"{name}\n    {_one_line(type(step).__doc__)}")
        _print_fields({n: (f, getattr(step, n)) for n, f in type(step).model_fields.items() if n != "kind"})
    print("\ngroups of parameters (--group GROUP:scaling=..,rank_ratio=..,density=..,exclude=true), or a glob pattern")
    for name, (meaning, _) in GROUPS.items():
        print(f"{name}\n    {meaning}")
    print("\npresets (--like)")
    for name, methods in PRESETS.items():
        print(f"{name}\n    {', '.join(methods)}")
    return 0


def _print_fields(fields: Mapping[str, tuple[Any, Any]]) -> None:
    from lors.merging.registry import describe_field

    for name, (field, default) in fields.items():
        shown = "none" if default is None else default
        print(f"      {name} = {shown}: {describe_field(field)}")


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())
