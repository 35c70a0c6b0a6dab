"""Model folders: lazy, checked reads of (sharded) safetensors; atomic, verified writes of a Hugging Face folder."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lors.errors import CheckpointError, InputError
from lors.model_folder import CONFIG, INDEX, WEIGHTS, folder_digest, read_json, resolve_folder, weight_files
from lors.store import sync_to_disk

__all__ = [
    "Checkpoint",
    "check_compatible",
    "is_finite",
    "write_model_folder",
    "writing",
]

HEAD = "proj_out.weight"  # Whisper's output layer, and what it is tied to
EMBEDDING = "model.decoder.embed_tokens.weight"
COPIED_BYTES = 64 * 2**20  # a tokenizer is a few MB; anything above this is no text file of a model folder
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class _Entry(NamedTuple):
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


class Checkpoint:
    """One model on disk, read tensor by tensor; nothing but the headers is in memory.

    `source` is a folder with config.json and model.safetensors (or its shards and their index), or a Hugging Face id,
    which is downloaded or, with HF_HUB_OFFLINE set, taken from the cache.
    Where config.json ties the word embeddings and the head is absent or identical to them, the head is not a tensor of
    its own and does not appear in `names`; a head that differs is kept.

    Raises CheckpointError: folder, config.json or a shard missing, pickled weights only, a corrupt or truncated file.
    """

    def __init__(self, source: str | Path) -> None:
        self.folder = resolve_folder(source)
        self.hub_id = None if Path(source).is_dir() else str(source)
        self.label = self.hub_id or self.folder.resolve().name
        self.config: dict[str, Any] = read_json(self.folder / CONFIG)
        self._entries: dict[str, _Entry] = {}
        for file, expected in weight_files(self.folder).items():
            entries = _read_header(file)
            if expected is not None and (lost := sorted(expected - entries.keys())):
                raise CheckpointError(
                    f"{file} lacks the tensor {lost[0]} that {INDEX} places there; copy the model again"
                )
            self._entries.update(
                (name, entry) for name, entry in entries.items() if expected is None or name in expected
            )
        self.weight_files = tuple(sorted({entry.file for entry in self._entries.values()}))
        if self._head_is_tied():
            del self._entries[HEAD]
        self.names = tuple(sorted(self._entries))
        self.float_names = tuple(name for name in self.names if self.dtype(name).is_floating_point)

    def _head_is_tied(self) -> bool:
        if not {HEAD, EMBEDDING} <= self._entries.keys() or not self.config.get("tie_word_embeddings", True):
            return False
        head, embedding = self._entries[HEAD], self._entries[EMBEDDING]
        return head[1:] == embedding[1:] and torch.equal(self.tensor(HEAD), self.tensor(EMBEDDING))

    def __repr__(self) -> str:
        return f"Checkpoint({self.label!r}, {len(self.names)} tensors, {self.parameters} parameters)"

    @cached_property
    def parameters(self) -> int:
        """Count of all parameters and buffers, tied ones once."""
        return sum(torch.Size(self.shape(name)).numel() for name in self.names)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._entries[name].dtype

    def bytes(self, name: str) -> int:
        return torch.Size(self.shape(name)).numel() * self.dtype(name).itemsize

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor as stored (its own dtype), mapped from the file: do not write into it."""
        file = self._entries[name].file
        # Opened anew for each tensor (0.3 ms): a mapping that lives on would keep every page read so far resident.
        with _reading(file), safe_open(file, framework="pt") as handle:
            return handle.get_tensor(name)  # type: ignore[no-any-return]

    def check_finite(self) -> None:
        """Read every float tensor. Raises CheckpointError naming the first that holds NaN or infinity."""
        for name in self.float_names:
            self.require_finite(name, self.tensor(name))

    def require_finite(self, name: str, tensor: torch.Tensor) -> None:
        """Raises CheckpointError naming the tensor of this checkpoint where `tensor` holds NaN or infinity."""
        if not is_finite(tensor):
            raise CheckpointError(
                f"{self.label}: the tensor {name} holds NaN or infinity; "
                f"use a checkpoint from before its training diverged"
            )

    def digest(self, memo: MutableMapping[str, str] | None = None) -> str:
        """sha256 over the contents of the weight files and config.json.

        `memo` as in `lors.store.file_digest`.
        """
        return folder_digest(self.folder, memo)


def check_compatible(base: Checkpoint, expert: Checkpoint) -> None:
    """Raises CheckpointError, naming what differs, unless architecture, tensors and shapes are the same."""
    hint = "give an expert that was fine-tuned from this base"
    for key in ("model_type", "architectures"):
        ours, theirs = base.config.get(key), expert.config.get(key)
        if ours and theirs and ours != theirs:
            raise CheckpointError(
                f"{expert.label} is another architecture than {base.label} ({key} {theirs}, not {ours}); {hint}"
            )
    for name in sorted({*base.names, *expert.names}):
        ours, theirs = (list(model.shape(name)) if name in model.names else "absent" for model in (base, expert))
        if ours != theirs:
            raise CheckpointError(f"the tensor {name} is {theirs} in {expert.label} but {ours} in {base.label}; {hint}")
        if base.dtype(name).is_floating_point != expert.dtype(name).is_floating_point:
            raise CheckpointError(
                f"the tensor {name} is {expert.dtype(name)} in {expert.label} "
                f"but {base.dtype(name)} in {base.label}; {hint}"
            )


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a float tensor of any shape has neither NaN nor infinity (one pass, no temporary)."""
    return tensor.numel() == 0 or bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


def write_model_folder(
    out: Path,
    base: Checkpoint,
    tensors: Iterable[tuple[str, torch.Tensor]],  # each of base.float_names, in that order, in any float dtype
    *,
    title: str = "",
    text: str = "",
    provenance: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> Checkpoint:
    """Write a complete Hugging Face folder: weights in the base's dtypes, and all its small JSON and text files.

    The folder appears at `out` in one rename, after every file was synced and every tensor read back and compared;
    until then, and after any error, nothing is there. One shard is in memory at a time. README.md is a model card of
    `title`, `text` (Markdown) and `provenance` (JSON).

    Raises InputError: `out` is not writable or holds something; CheckpointError: a tensor is not finite in its dtype.
    """
    out = Path(out)
    partial = out.absolute().parent / f".{out.name}.{uuid.uuid4().hex[:8]}.partial"
    with writing(out):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(f"{out} is already there and not empty; choose another output folder or remove it")
        partial.mkdir(parents=True)
    try:
        with writing(out):
            _copy_side_files(base, partial)
            (partial / "README.md").write_text(_card(base, title or out.name, text, provenance or {}), encoding="utf-8")
        _write_weights(partial, base, tensors, max_shard_bytes)
        check_compatible(base, Checkpoint(partial))
        with writing(out):
            for path in (*partial.iterdir(), partial):
                sync_to_disk(path)
            partial.rename(out)
            sync_to_disk(out.absolute().parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return Checkpoint(out)


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Turns a failed write into the user's InputError naming `out`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InputError(f"cannot write {out} ({reason}); choose a place that is writable and has room") from error


def _write_weights(
    folder: Path, base: Checkpoint, tensors: Iterable[tuple[str, torch.Tensor]], max_shard_bytes: int
) -> None:
    given = iter(tensors)
    shards = _plan_shards(base, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = folder / (WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors")
        block = {name: _output_tensor(base, name, given) for name in names}
        with writing(file):
            save_file(block, file, metadata={"format": "pt"})
            file.chmod((folder / CONFIG).stat().st_mode)  # safetensors writes files that only their owner may read
        with safe_open(file, framework="pt") as written:
            for name, tensor in block.items():
                if not torch.equal(written.get_tensor(name), tensor):
                    raise InputError(
                        f"the tensor {name} read back from {file} differs from what was written; check the disk"
                    )
        weight_map |= dict.fromkeys(names, file.name)
    assert next(given, None) is None, "more tensors than the base has"
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(map(base.bytes, base.names))}, "weight_map": weight_map}
        with writing(folder):
            (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


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


def _output_tensor(base: Checkpoint, name: str, given: Iterator[tuple[str, torch.Tensor]]) -> torch.Tensor:
    dtype = base.dtype(name)
    if not dtype.is_floating_point:
        return base.tensor(name)
    found, tensor = next(given, ("nothing", torch.empty(0)))
    assert (found, tuple(tensor.shape)) == (name, base.shape(name)), f"expected {name}, got {found}"
    tensor = tensor.to(dtype).contiguous()
    if not is_finite(tensor):
        raise CheckpointError(
            f"the tensor {name} is not finite as {dtype}; use a smaller scaling coefficient or a float32 base"
        )
    return tensor


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


def _read_header(file: Path) -> dict[str, _Entry]:
    entries = {}
    with _reading(file), safe_open(file, framework="pt") as handle:
        for name in handle.keys():  # noqa: SIM118 (the handle is not iterable)
            part = handle.get_slice(name)
            if part.get_dtype() not in DTYPES:
                raise CheckpointError(
                    f"the tensor {name} in {file} is {part.get_dtype()}, a quantised dtype; "
                    f"give the model before quantisation"
                )
            entries[name] = _Entry(file, tuple(part.get_shape()), DTYPES[part.get_dtype()])
    return entries


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} cannot be read as safetensors ({error}); it is corrupt or cut off: copy it again"
        ) from error
