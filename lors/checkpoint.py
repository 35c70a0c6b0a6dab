"""Model folders, read: lazy, checked reads of (sharded) safetensors."""

from __future__ import annotations

from collections.abc import MutableMapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from lors.errors import CheckpointError
from lors.model_folder import CONFIG, INDEX, folder_digest, read_json, resolve_folder, weight_files
from lors.tensor_file import Entry, read_header, read_rows, reading

__all__ = [
    "Checkpoint",
    "check_compatible",
    "is_finite",
]

HEAD = "proj_out.weight"  # Whisper's output layer, and what it is tied to
EMBEDDING = "model.decoder.embed_tokens.weight"


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
        self._entries: dict[str, Entry] = {}
        for file, expected in weight_files(self.folder).items():
            _, entries = read_header(file)
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
        return head[2:] == embedding[2:] and torch.equal(self.tensor(HEAD), self.tensor(EMBEDDING))

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
        with reading(file), safe_open(file, framework="pt") as handle:
            return handle.get_tensor(name)  # type: ignore[no-any-return]

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of the first dimension, in the tensor's own dtype: a copy, which may be written into.

        A tensor of no dimensions has one row, itself.
        """
        return read_rows(self._entries[name], start, stop)

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

        `memo` as in `lors.files.file_digest`.
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
