"""Prints docs/experiment.md from the models of lors.config: `python docs/experiment.py > docs/experiment.md`."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from lors.config import Experiment

INTRODUCTION = """\
# The experiment file

One YAML file holds everything that a run depends on. Unknown keys are refused, with the nearest known one, and so
is a key that is given twice. Paths are relative to the folder that the command runs in. `--set key=value` changes a
setting for one command, as in `--set prune.rank_ratio=0.2` or `--set 'merge.scaling={search: [0.2, 0.4]}'`.

This page is printed by `python docs/experiment.py` from the models that `lors/config.py` puts together.
"""

ALIKE = ("overrides", "corpora_of")
"""Sections whose keys are those of others."""


def sections(model: type[BaseModel], prefix: str = "") -> list[tuple[str, type[BaseModel]]]:
    """(dotted key, model) of every section under `model`, itself first, in the order of the fields."""
    found = [(prefix, model)]
    for name, field in model.model_fields.items():
        if name in ALIKE:
            continue
        for inner in models_in(field.annotation):
            found += sections(inner, f"{prefix}.{name}".lstrip("."))
    return found


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a field may hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in getattr(annotation, "__args__", ()) for model in models_in(inner)]


def default(field: Any) -> str:
    """A field's default as YAML would write it."""
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, BaseModel):
        return "see below"
    return "none" if value is None else f"`{list(value) if isinstance(value, tuple) else value}`"


def main() -> None:
    """Print the page."""
    print(INTRODUCTION)
    for key, model in sections(Experiment):
        source = model.model_fields.get("source")
        title = f"`{key}`" if key else "Top level"
        if source is not None:
            title += f", `source: {source.annotation.__args__[0]}`"  # type: ignore[union-attr]
        print(f"## {title}\n\n{' '.join((model.__doc__ or '').split())}\n")
        print("| key | default | meaning |\n| --- | --- | --- |")
        for name, field in model.model_fields.items():
            print(f"| `{name}` | {default(field)} | {' '.join((field.description or '').split())} |")
        print()


if __name__ == "__main__":
    main()
