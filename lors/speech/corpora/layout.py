"""Which Parquet files a (configuration, split) of a data set reads, found as the Hugging Face hub's conventions say.

README.md's `configs` name them, or else the files' own names: CONFIG/SPLIT-00000-of-00004.parquet, or
CONFIG/SPLIT/0000.parquet as in the copies that the hub converts (refs/convert/parquet).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import yaml

from lors.errors import ConfigError, CorpusError
from lors.files import brief
from lors.settings import nearest
from lors.speech.corpora.presets import CONVERTED

__all__ = ["Layout", "find_layout"]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Layout:
    """The Parquet files of a data set by configuration and split, those that its names promise among them."""

    what: str
    files: Mapping[str, Mapping[str, list[str]]]
    there: frozenset[str]

    def files_of(self, name: str | None, split: str | None) -> list[str]:
        """The files of a split (None: of all) of a configuration (None: the only one, or the default)."""
        if name is None:
            name = next(iter(self.files)) if len(self.files) == 1 else "default"
            if name not in self.files:
                raise ConfigError(
                    f"{self.what} has several configurations: set corpora.name to one of {_some(self.files)}"
                )
        if name not in self.files:
            raise ConfigError(
                f"{self.what} has no configuration {name!r}{nearest(name, self.files)}; set corpora.name to one of "
                f"{_some(self.files)}"
            )
        splits = self.files[name]
        if split is not None and split not in splits:
            raise ConfigError(
                f"{self.what} has no split {split!r} in {name}{nearest(split, splits)}; it has {_some(splits)}: map "
                "yours under corpora.splits, as in `{validation: dev}`"
            )
        found = list(dict.fromkeys(chain(*splits.values()))) if split is None else splits[split]
        if missing := [file for file in found if file not in self.there]:
            raise CorpusError(
                f"{self.what} lacks {missing[0]}, which the names of its other files promise; copy it again"
            )
        if partial := [file for file in found if _PARTIAL in file]:
            _logger.warning("%s has only a part of this split, as the hub cut it: %s.", self.what, partial[0])
        return found


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:30]) + (f" and {len(listed) - 30} more" if len(listed) > 30 else "")


_PARTIAL = "/partial-"  # refs/convert/parquet stops after some GB of a split
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})(-[0-9a-f]+)?$")


def find_layout(what: str, files: Sequence[str], card: str) -> Layout:
    """Where each configuration and split lies, by README.md's configs, else by the files' names (relative, POSIX)."""
    there = sorted(file for file in files if file.endswith(".parquet"))
    if not there:
        script = [file for file in files if file.endswith(".py")]
        held = f"is a loading script ({script[0]}), which is never run here" if script else "has no Parquet files"
        raise CorpusError(
            f"{what} {held}; where the hub keeps a Parquet copy, set corpora.revision to {CONVERTED}, else convert it "
            "and give the folder"
        )
    promised = sorted({*there, *chain(*map(_siblings, there))})
    try:
        found = _by_card(promised, _front_matter(what, card).get("configs")) or _by_name(promised)
    except (AttributeError, KeyError, TypeError, re.error) as error:
        raise CorpusError(
            f"the configs in the README.md of {what} are not laid out as the hub's ({brief(error)}); correct or remove "
            "them"
        ) from error
    return Layout(what, found, frozenset(there))


def _siblings(file: str) -> list[str]:
    stem = file.removesuffix(".parquet")
    shard = _SHARD.search(stem)
    if not shard or shard[3]:  # names that end in a hash promise nothing
        return []
    return [f"{stem[: shard.start()]}-{number:05d}-of-{shard[2]}.parquet" for number in range(int(shard[2]))]


def _by_name(files: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    found: dict[str, dict[str, list[str]]] = {}
    for file in files:
        *folders, stem = file.removesuffix(".parquet").split("/")
        split = folders.pop() if stem.isdigit() and folders else _SHARD.sub("", stem)
        name = "/".join(folders[folders[:1] == ["data"] :]) or "default"
        found.setdefault(name, {}).setdefault(split.removeprefix("partial-"), []).append(file)
    return found


def _by_card(files: Sequence[str], configs: Any) -> dict[str, dict[str, list[str]]]:
    found: dict[str, dict[str, list[str]]] = {}
    for config in configs if isinstance(configs, list) else ():
        name, listed = str(config.get("config_name", "default")), config.get("data_files")
        if isinstance(listed, dict):
            listed = [{"split": split, "path": path} for split, path in listed.items()]
        elif isinstance(listed, str) or (isinstance(listed, list) and all(isinstance(each, str) for each in listed)):
            listed = [{"split": "train", "path": listed}]
        if listed is None:  # a folder, whose files' names say the splits
            below = f"{config.get('data_dir', '')}/".lstrip("./")
            inside = _by_name([file.removeprefix(below) for file in files if file.startswith(below)])
            splits = {s: [below + file for file in named] for part in inside.values() for s, named in part.items()}
        else:
            splits = {str(each["split"]): _matching(files, each["path"]) for each in listed}
        if splits := {split: matching for split, matching in splits.items() if matching}:
            found[name] = splits
    return found


def _matching(files: Sequence[str], patterns: str | list[str]) -> list[str]:
    wanted = [patterns] if isinstance(patterns, str) else patterns
    expressions = [re.compile(_GLOB.sub(_translated, pattern.removeprefix("./"))) for pattern in wanted]
    return [file for file in files if any(expression.fullmatch(file) for expression in expressions)]


_GLOB = re.compile(r"(\*\*/)|(\*\*)|(\*)|(\?)|(\[[^]]+\])|(.)", re.DOTALL)


def _translated(token: re.Match[str]) -> str:
    return ("(?:.*/)?", ".*", "[^/]*", "[^/]", token[0].replace("[!", "[^"), re.escape(token[0]))[
        (token.lastindex or 6) - 1
    ]


def _front_matter(what: str, card: str) -> dict[str, Any]:
    found = re.match(r"---[ \t]*\n(.*?)\n---[ \t]*(?:\n|$)", card.replace("\r\n", "\n"), re.DOTALL)
    try:
        content = yaml.safe_load(found[1]) if found else {}
    except (yaml.YAMLError, ValueError) as error:
        raise CorpusError(f"the README.md of {what} does not begin with valid YAML; correct it or remove it") from error
    return content if isinstance(content, dict) else {}
