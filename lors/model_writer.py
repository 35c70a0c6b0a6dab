"""Model folders, written: complete, atomic, verified, by row blocks from any thread."""

from __future__ import annotations

import json
import shutil
import threading
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lors.blocks import row_blocks
from lors.checkpoint import Checkpoint, check_compatible, is_finite
from lors.errors import CheckpointError
from lors.files import new_folder, sync_to_disk, writing
from lors.model_folder import CONFIG, INDEX, WEIGHTS, folder_digest
from lors.tensor_file import TensorFile

__all__ = ["ModelWriter", "model_writer", "write_model_folder"]

COPIED_BYTES = 64 * 2**20  # a tokenizer is a few MB; anything above this is no text file of a model folder


class ModelWriter:
    """A model folder that is being written: its tensors come by row blocks, in any order, from any thread.

    Made by `model_writer`, and complete when that ends without an error.
    """

    def __init__(self, out: Path, base: Checkpoint, max_shard_bytes: int = 5_000_000_000) -> None:
        self.out, self.base = Path(out), base
        self.digest = ""  # as `Checkpoint.digest`, once it is complete
        self._files: list[TensorFile] = []
        self._places: dict[str, TensorFile] = {}
        self._missing = Counter({name: _row_count(base.shape(name)) for name in base.names})
        self._lock = threading.Lock()
        with writing(self.out):
            self._place = new_folder(self.out)
            self.partial = self._place.with_name(f".{self._place.name}.{uuid.uuid4().hex[:8]}.partial")
            self.partial.mkdir(parents=True)
        shards = _plan_shards(base, max_shard_bytes)
        try:
            with writing(self.out):
                for number, names in enumerate(shards, start=1):
                    name = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
                    self._files.append(
                        TensorFile(self.partial / name, {n: (base.dtype(n), base.shape(n)) for n in names})
                    )
                    self._places.update(dict.fromkeys(names, self._files[-1]))
            for name in base.names:
                if not base.dtype(name).is_floating_point:
                    for start, stop in row_blocks(base.shape(name)):
                        self._write(name, start, base.rows(name, start, stop))
        except BaseException:
            self.discard()
            raise

    def write(self, name: str, start: int, rows: torch.Tensor) -> None:
        """Write `rows`, of any float dtype, as the tensor's rows from `start` on, cast once to the base's dtype.

        Raises CheckpointError where they are not finite in that dtype, InputError where the disk is full.
        """
        dtype = self.base.dtype(name)
        rows = rows.to(dtype)
        if not is_finite(rows):
            raise CheckpointError(
                f"the tensor {name} is not finite as {dtype}; use a smaller scaling coefficient or a float32 base"
            )
        self._write(name, start, rows)

    def _write(self, name: str, start: int, rows: torch.Tensor) -> None:
        assert tuple(rows.shape[1:]) == self.base.shape(name)[1:], f"rows of {name} have the shape {tuple(rows.shape)}"
        with writing(self.out):
            self._places[name].write(name, start, rows)
        with self._lock:
            self._missing[name] -= len(rows)

    def finish(self, *, title: str, text: str, provenance: Mapping[str, Any]) -> None:
        """Write the small files, read every byte back, and rename the folder into place."""
        self.digest = self._finish_files(title, text, provenance)
        check_compatible(self.base, Checkpoint(self.partial))
        with writing(self.out):
            for path in (*self.partial.iterdir(), self.partial):
                sync_to_disk(path)
            self.partial.rename(self._place)
            sync_to_disk(self._place.parent)

    def _finish_files(self, title: str, text: str, provenance: Mapping[str, Any]) -> str:
        lacking = [name for name, rows in self._missing.items() if rows]
        assert not lacking, f"not all of {lacking[0]} was given"
        with writing(self.out):
            _copy_side_files(self.base, self.partial)
            card = _card(self.base, title or self.out.name, text, provenance)
            (self.partial / "README.md").write_text(card, encoding="utf-8")
            known = {}
            for file in self._files:
                known[file.path] = file.close()
                file.path.chmod((self.partial / CONFIG).stat().st_mode)
            if len(self._files) > 1:
                weight_map = {name: file.path.name for name, file in sorted(self._places.items())}
                total = sum(map(self.base.bytes, self.base.names))
                index = {"metadata": {"total_size": total}, "weight_map": weight_map}
                content = json.dumps(index, indent=2, sort_keys=True) + "\n"
                (self.partial / INDEX).write_text(content, encoding="utf-8")
            return folder_digest(self.partial, known=known)

    def discard(self) -> None:
        """Remove whatever was written."""
        for file in self._files:
            file.abandon()
        shutil.rmtree(self.partial, ignore_errors=True)


def _row_count(shape: tuple[int, ...]) -> int:
    """The rows that `row_blocks` covers."""
    return sum(stop - start for start, stop in row_blocks(shape))


@contextmanager
def model_writer(
    out: Path,
    base: Checkpoint,
    *,
    title: str = "",
    text: str = "",
    provenance: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> Iterator[ModelWriter]:
    """Writes a complete Hugging Face folder: weights in the base's dtypes, and all its small JSON and text files.

    The folder appears at `out` in one rename, after every file was synced and every block read back and compared;
    until then, and after any error, nothing is there. README.md is a model card of `title`, `text` (Markdown) and
    `provenance` (JSON; it may be filled in until the end of the block).

    Raises InputError: `out` is not writable or holds something, the disk is full; CheckpointError: a tensor is not
    finite in its dtype.
    """
    writer = ModelWriter(out, base, max_shard_bytes)
    try:
        yield writer
        writer.finish(title=title, text=text, provenance=provenance or {})
    except BaseException:
        writer.discard()
        raise


def write_model_folder(
    out: Path,
    base: Checkpoint,
    tensors: Iterable[tuple[str, torch.Tensor]],  # each of base.float_names, in that order, in any float dtype
    **options: Any,
) -> Checkpoint:
    """Write a complete folder from whole tensors; options, result and errors as of `model_writer`."""
    with model_writer(out, base, **options) as writer:
        for name, tensor in tensors:
            assert tuple(tensor.shape) == base.shape(name), f"{name} has the shape {tuple(tensor.shape)}"
            for start, stop in row_blocks(base.shape(name)):
                writer.write(
                    name, start, tensor.reshape(-1, *tensor.shape[1:])[start:stop] if tensor.ndim else tensor.reshape(1)
                )
    return Checkpoint(out)


def _plan_shards(base: Checkpoint, limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name in base.names:
        if shards[-1] and size + base.bytes(name) > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += base.bytes(name)
    return shards


def _copy_side_files(base: Checkpoint, folder: Path) -> None:
    for path in sorted(base.folder.iterdir()):
        small = path.is_file() and path.stat().st_size <= COPIED_BYTES
        if small and path.suffix in {".json", ".txt"} and not path.name.endswith(".index.json"):
            shutil.copyfile(path, folder / path.name)


def _card(base: Checkpoint, title: str, text: str, provenance: Mapping[str, Any]) -> str:
    head = ["library_name: transformers", "pipeline_tag: automatic-speech-recognition", "tags: [lors, merge]"]
    if base.hub_id:
        head.append(f"base_model: {base.hub_id}")
    record = json.dumps({"base": base.label, **provenance}, indent=2, sort_keys=True, ensure_ascii=False)
    parts = ["\n".join(["---", *head, "---"]), f"# {title}", text.strip(), f"## Provenance\n\n```json\n{record}\n```"]
    return "\n\n".join(filter(None, parts)) + "\n"
