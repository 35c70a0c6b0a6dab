"""Settings as YAML: plain data, each key once. No torch here."""

from __future__ import annotations

from typing import Any

import yaml

__all__ = ["read_yaml"]


class _Loader(yaml.SafeLoader):
    """PyYAML's own keeps the last of two equal keys and says nothing."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            line, own = key.start_mark.line + 1, (key.tag, key.value)
            if own in lines:
                raise yaml.YAMLError(
                    f"the key {key.value!r} is on line {lines[own]} and again on line {line}; keep one of them"
                )
            lines[own] = line
        return node


def read_yaml(text: str) -> Any:
    """The data of a document. Raises yaml.YAMLError, also for a key that is given twice and a date that is none."""
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    except ValueError as error:
        raise yaml.YAMLError(f"{error}; put a text that looks like a date or a number in quotes") from error
    finally:
        loader.dispose()
