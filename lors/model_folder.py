"""What a model folder says without its tensors: where it is, its weight files, its digest. No torch here."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, MutableMapping
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any

from lors.errors import CheckpointError, UnreachableError
from lors.files import file_digest, is_safe
from lors.network import can_pass, patiently

__all__ = [
    "CONFIG",
    "INDEX",
    "WEIGHTS",
    "DigestsAhead",
    "folder_digest",
    "parameter_shapes",
    "read_json",
    "resolve_folder",
    "weight_files",
]

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
# Exact names and not "*.safetensors": some repositories also hold a second, float32 copy of the weights.
DOWNLOADED = [WEIGHTS, "model-*-of-*.safetensors", "*.json", "*.txt"]
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
CONVERSION = (
    "convert it in an environment that you trust with "
    "`AutoModelForSpeechSeq2Seq.from_pretrained(SOURCE).save_pretrained(FOLDER)` and give that folder"
)


def resolve_folder(source: str | Path) -> Path:
    """The folder of a model given as a folder or as a Hugging Face id.

    Raises CheckpointError, or UnreachableError where the hub does not answer now.
    """
    folder, text = Path(source), str(source)
    if folder.is_dir():
        return folder
    if folder.exists() or not HUB_ID.fullmatch(text):
        raise CheckpointError(
            f"{text} is not a folder; give a model folder with config.json and {WEIGHTS}, or a Hugging Face id"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(patiently(lambda: snapshot_download(text, allow_patterns=DOWNLOADED)))
    except Exception as error:  # the client's errors share no base: HTTP, offline mode, cache, validation, disk
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        if can_pass(error):
            raise UnreachableError(
                f"the hub did not give the model {text} ({reason}): check the network and run the same command again, "
                "or download the model and give its folder"
            ) from error
        raise CheckpointError(
            f"{text} is neither a folder nor a Hugging Face model that can be had here ({reason}); "
            f"check the spelling and the network, or download the model and give its folder"
        ) from error


def folder_digest(
    folder: Path,
    memo: MutableMapping[str, str] | None = None,  # as in `lors.files.file_digest`
    known: Mapping[Path, str] | None = None,  # sha256 by file, of those just read
) -> str:
    """sha256 over the contents of the weight files and config.json."""
    files = [*sorted(weight_files(folder)), folder / CONFIG]
    known = known or {}
    lines = (f"{file.name} {known.get(file) or file_digest(file, memo)}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


class DigestsAhead(dict[str, str]):
    """A memo of digests that a thread computes, while the caller imports torch, say; to ask it is to wait for them.

    What is not there, or cannot be read, it leaves to be found out where it is used.
    """

    def __init__(self, sources: Iterable[str | Path]) -> None:  # model folders and files
        super().__init__()
        self._thread = Thread(target=self._fill, args=(list(sources),), daemon=True)
        self._thread.start()

    def _fill(self, sources: Iterable[str | Path]) -> None:
        found: dict[str, str] = {}
        for source in map(Path, sources):
            with suppress(CheckpointError, OSError):
                if source.is_dir():
                    folder_digest(source, found)
                elif source.is_file():
                    file_digest(source, found)
        self.update(found)

    def get(self, key: str, default: Any = None) -> Any:
        self._thread.join()
        return super().get(key, default)


def weight_files(folder: Path) -> dict[Path, set[str] | None]:
    """Each weight file, and the tensors that the index places in it (None where there is no index)."""
    if (folder / WEIGHTS).is_file():
        return {folder / WEIGHTS: None}
    if not (folder / INDEX).is_file():
        if any(folder.glob("pytorch_model*.bin")):
            raise CheckpointError(f"{folder} has pickled weights only, and unpickling can run any code; {CONVERSION}")
        raise CheckpointError(
            f"{folder} has no {WEIGHTS} and no {INDEX}; if its weights are in another format, {CONVERSION}"
        )
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / INDEX} has no weight_map; copy the model again")
    files: dict[Path, set[str] | None] = {}
    for shard in sorted({str(shard) for shard in weight_map.values()}):
        if "/" in shard or not is_safe(shard) or not (folder / shard).is_file():
            raise CheckpointError(
                f"{folder} lacks the shard {shard} that {INDEX} names; copy the model again, with all its shards"
            )
        files[folder / shard] = {name for name, place in weight_map.items() if place == shard}
    return files


def parameter_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor, from the headers of the weight files. Raises CheckpointError."""
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="numpy") as opened:
                shapes |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file} cannot be read as safetensors ({error}); it is corrupt or cut off: copy it again"
            ) from error
    return shapes


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a model folder. Raises CheckpointError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent} has no {path.name}; give the whole folder that `save_pretrained` wrote"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); copy the model again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object; copy the model again")
    return content
