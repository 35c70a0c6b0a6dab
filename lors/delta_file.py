"""The compact expert: a task vector, pruned or whole, as one safetensors file, written and read tensor by tensor.

Keys are `<name>/us`, `<name>/vh`, `<name>/indices`, `<name>/values` and `<name>/whole`, as in `prune.PrunedDelta`; the
metadata key `lors` holds one JSON object (one key, so that the bytes do not depend on a hash map's order):
format, version, base (digest), settings (null where nothing was pruned), tensors (shape, energy, error by name),
provenance.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from lors.checkpoint import writing
from lors.errors import CheckpointError
from lors.low_rank import squared_norm
from lors.prune import PrunedDelta, PruneSettings
from lors.store import file_digest

__all__ = ["DeltaFile", "write", "write_dense"]

FORMAT, VERSION = "lors.delta", 1
HEADER_TYPES = {torch.float32: "F32", torch.int32: "I32"}
COPY_BYTES = 16 * 2**20


class DeltaFile:
    """A task vector on disk. Raises CheckpointError: missing, corrupt, or not a delta file of a version known here."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with safe_open(self.path, framework="pt") as handle:
                text, self._keys = (handle.metadata() or {}).get("lors"), frozenset(handle.keys())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{self.path} cannot be read as a delta file ({error}); write it again with `lors prune`"
            ) from error
        try:
            self.metadata: dict[str, Any] = json.loads(text or "{}")
            known = self.metadata.get("format") == FORMAT and self.metadata.get("version") == VERSION
            self.settings = PruneSettings(**self.metadata["settings"]) if known and self.metadata["settings"] else None
        except (ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
            raise CheckpointError(f"{self.path} has broken delta metadata; write it again with `lors prune`") from error
        if not known:
            raise CheckpointError(
                f"{self.path} is not a LoRS delta file of version {VERSION}; "
                f"write it with `lors prune`, or give the model's folder"
            )
        self._tensors: dict[str, dict[str, Any]] = self.metadata["tensors"]
        self.names = tuple(sorted(self._tensors))

    @property
    def base_digest(self) -> str:
        """`Checkpoint.digest()` of the base that this task vector is relative to."""
        return str(self.metadata["base"])

    @cached_property
    def retained_energy(self) -> float:
        """1 - |pruned - tau|^2 / |tau|^2 over the whole task vector tau; 1 where nothing was pruned."""
        energy, error = (sum(tensor[key] for tensor in self._tensors.values()) for key in ("energy", "error"))
        return 1.0 - error / energy if energy else 1.0

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name]["shape"])

    def parts(self, name: str) -> PrunedDelta:
        """The parts as stored."""
        try:
            with safe_open(self.path, framework="pt") as handle:
                parts = {
                    part: handle.get_tensor(f"{name}/{part}")
                    for part in ("us", "vh", "indices", "values", "whole")
                    if f"{name}/{part}" in self._keys
                }
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.path} cannot be read ({error}); write it again with `lors prune`") from error
        facts = self._tensors[name]
        return PrunedDelta(self.shape(name), **parts, energy=facts["energy"], error=facts["error"])

    def delta(self, name: str) -> torch.Tensor:
        """The dense delta, float32. Do not write into it."""
        return self.parts(name).dense()

    def items(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, dense delta) for each of `names`."""
        return ((name, self.delta(name)) for name in self.names)

    def digest(self, memo: MutableMapping[str, str] | None = None) -> str:
        """sha256 of the file; `memo` as in `Checkpoint.digest`."""
        return file_digest(self.path, memo)


def write(
    path: str | Path,
    deltas: Iterable[tuple[str, PrunedDelta]],
    *,
    base_digest: str,
    settings: PruneSettings | None,
    provenance: Mapping[str, Any] | None = None,  # anything JSON
) -> DeltaFile:
    """Write a task vector to one file, which appears (or replaces another) in one rename.

    One tensor is in memory at a time. The same arguments give the same bytes.
    Raises InputError where `path` cannot be written.
    """
    path = Path(path)
    partial = path.absolute().parent / f".{path.name}.{uuid.uuid4().hex[:8]}.partial"
    header: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    with writing(path):
        partial.parent.mkdir(parents=True, exist_ok=True)
        spool = tempfile.TemporaryFile(dir=partial.parent)  # noqa: SIM115 (closed below)
    # The header goes first and holds every offset, so the data waits in a nameless file until the last tensor is known.
    with spool:
        for name, delta in deltas:
            assert name not in tensors, f"{name} given twice"
            tensors[name] = {"shape": list(delta.shape), "energy": delta.energy, "error": delta.error}
            for part, tensor in delta.parts().items():
                start = spool.tell()
                with writing(path):
                    spool.write(tensor.contiguous().numpy().data)
                header[f"{name}/{part}"] = {
                    "dtype": HEADER_TYPES[tensor.dtype],
                    "shape": list(tensor.shape),
                    "data_offsets": [start, spool.tell()],
                }
        facts = {
            "format": FORMAT,
            "version": VERSION,
            "base": base_digest,
            "settings": settings.model_dump(mode="json") if settings else None,
            "tensors": tensors,
            "provenance": dict(provenance or {}),
        }
        text = json.dumps({"__metadata__": {"lors": json.dumps(facts, sort_keys=True)}, **header}).encode()
        text += b" " * (-len(text) % 8)  # safetensors aligns the data to 8 bytes
        try:
            with writing(path), partial.open("wb") as stream:
                stream.write(len(text).to_bytes(8, "little") + text)
                spool.seek(0)
                shutil.copyfileobj(spool, stream, COPY_BYTES)
                stream.flush()
                os.fsync(stream.fileno())
            DeltaFile(partial)
            with writing(path):
                partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    return DeltaFile(path)


def write_dense(
    path: str | Path,
    deltas: Iterable[tuple[str, torch.Tensor]],  # (name, delta float32)
    *,
    base_digest: str,
    provenance: Mapping[str, Any] | None = None,
) -> DeltaFile:
    """Write a task vector that was not pruned; otherwise as `write`."""
    whole = ((name, PrunedDelta(tuple(delta.shape), whole=delta, energy=squared_norm(delta))) for name, delta in deltas)
    return write(path, whole, base_digest=base_digest, settings=None, provenance=provenance)
