"""Merging methods: one file a family, each of which registers its methods; a new file joins by being here."""

from importlib import import_module
from pkgutil import iter_modules

from lors.merging.registry import METHODS, Method, combine_files, get_method

__all__ = ["METHODS", "Method", "combine_files", "get_method"]

for _module in sorted(module.name for module in iter_modules(__path__)):
    if _module not in {"folders", "registry"}:
        import_module(f"{__name__}.{_module}")
METHODS.update({name: METHODS.pop(name) for name in sorted(METHODS)})
