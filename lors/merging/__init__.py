"""Merging: methods as data (`registry`), their algebra (`recipe`), and the engine that streams them (`engine`)."""

from lors.merging.recipe import Recipe
from lors.merging.registry import METHODS, Method, get_method, make_recipe

__all__ = ["METHODS", "Method", "Recipe", "get_method", "make_recipe"]
