"""The compact expert: a task vector, pruned or whole, as one safetensors file, written and read tensor by tensor.

Keys are `<name>/<part>`, the parts being those of `prune.PrunedDelta`: us, vh, scale (int8 factors only), values and
the codes of their indices (mask, or positions and counts: `sparse.PackedIndices`), whole. The metadata key `lors` holds
one JSON object (one key, so that the bytes do not depend on a hash map's order): format, version, base (digest), dtype,
settings (null where nothing was pruned), retained_energy, tensors (by name: shape, energy, error, retained_energy, and
where they are there rank, count, threshold), provenance.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager
from functools import cached_property
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from lors.checkpoint import is_finite
from lors.errors import CheckpointError
from lors.files import file_digest, writing
from lors.low_rank import squared_norm
from lors.prune import TORCH_DTYPES, Dtype, PrunedDelta, PruneSettings
from lors.sparse import PackedIndices

__all__ = ["DeltaFile", "header_bytes", "write", "write_dense"]

FORMAT, VERSION = "lors.delta", 2
PARTS = ("us", "vh", "scale", "values", "whole")
CODES = ("mask", "positions", "counts")
HEADER_TYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.uint16: "U16",
    torch.uint32: "U32",
}
COPY_BYTES = 16 * 2**20


class DeltaFile:
    """A task vector on disk. Raises CheckpointError: missing, corrupt, or not a delta file of a version known here.

    Its tensors may be read by several threads at once.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with self._reading() as handle:
            text, self._keys = (handle.metadata() or {}).get("lors"), frozenset(handle.keys())
        try:
            self.metadata: dict[str, Any] = json.loads(text or "{}")
            found, version = self.metadata.get("format"), self.metadata.get("version")
            if known := (found, version) == (FORMAT, VERSION):
                self.settings = PruneSettings(**self.metadata["settings"]) if self.metadata["settings"] else None
                self._tensors = {name: _parsed(facts) for name, facts in self.metadata["tensors"].items()}
                self.base_digest = str(self.metadata["base"])
                self.dtype: Dtype = self.metadata["dtype"]
                self._stored = TORCH_DTYPES[self.dtype]
        except (ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
            raise CheckpointError(f"{self.path} has broken delta metadata; write it again with `lors prune`") from error
        if not known:
            raise CheckpointError(
                f"{self.path} is a LoRS delta file of version {version}, and this LoRS reads version {VERSION}; "
                f"write it again with `lors prune`, or use the LoRS that wrote it"
                if found == FORMAT
                else f"{self.path} is not a LoRS delta file of version {VERSION}; "
                f"write it with `lors prune`, or give the model's folder"
            )
        self.names = tuple(sorted(self._tensors))
        self._held = threading.local()

    @cached_property
    def retained_energy(self) -> float:
        """1 - |pruned - tau|^2 / |tau|^2 over the whole task vector tau; 1 where nothing was pruned."""
        return _retained(self.metadata["tensors"].values())

    @property
    def budget(self) -> int | None:
        """The bytes that it was pruned to, where its ranks and densities are of a budget and not of the settings."""
        budget: int | None = self.metadata.get("provenance", {}).get("budget")
        return budget

    def shape(self, name: str) -> tuple[int, ...]:
        shape: tuple[int, ...] = self._tensors[name]["shape"]
        return shape

    def parts(self, name: str) -> PrunedDelta:
        """The parts as stored. Raises CheckpointError, naming the tensor, where they are broken."""
        facts = self._tensors[name]
        with self._reading() as handle:
            found = {
                part: handle.get_tensor(f"{name}/{part}") for part in PARTS + CODES if f"{name}/{part}" in self._keys
            }
        codes = {part: found.pop(part) for part in CODES if part in found}
        with self._checking(name):
            indices = PackedIndices(codes, prod(facts["shape"])) if codes else None
            pruned = PrunedDelta(dtype=self.dtype, **found, indices=indices, **facts)
            _check(pruned, self._stored)
        return pruned

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:  # (stop - start, *shape[1:]) float32
        """The delta in [start, stop) of its first dimension; asked for in turn, nothing is read or unpacked twice.

        The parts of the tensor that a thread asked for last stay mapped. Do not write into what this returns.
        """
        if f"{name}/whole" in self._keys:
            shape = self.shape(name)
            with self._reading() as handle:
                key = f"{name}/whole"
                block = handle.get_slice(key)[start:stop] if shape else handle.get_tensor(key).reshape(1)
            with self._checking(name):
                _check(PrunedDelta((stop - start, *shape[1:]), self.dtype, whole=block), self._stored)
            return block.float()  # type: ignore[no-any-return]
        held = self._held
        if getattr(held, "name", None) != name:
            held.pruned, held.name, held.kept, held.next = self.parts(name), name, 0, None
        pruned: PrunedDelta = held.pruned
        block = pruned.rows(start, stop)
        if pruned.threshold is not None:
            # The count is checked where all rows were read in turn, as every merge does.
            if start == 0:
                held.kept, held.next = 0, 0
            if start == held.next:
                held.kept, held.next = held.kept + int(block.count_nonzero()), stop
                if stop == pruned.shape[0]:
                    with self._checking(name):
                        pruned.check_count(held.kept)
        return block

    def delta(self, name: str) -> torch.Tensor:
        """The dense delta, float32. Do not write into it."""
        with self._checking(name):
            return self.parts(name).dense()

    def items(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, dense delta) for each of `names`."""
        return ((name, self.delta(name)) for name in self.names)

    def digest(self, memo: MutableMapping[str, str] | None = None) -> str:
        """sha256 of the file; `memo` as in `Checkpoint.digest`."""
        return file_digest(self.path, memo)

    @contextmanager
    def _reading(self) -> Iterator[Any]:
        try:
            with safe_open(self.path, framework="pt") as handle:
                yield handle
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{self.path} cannot be read as a delta file ({error}); write it again with `lors prune`"
            ) from error

    @contextmanager
    def _checking(self, name: str) -> Iterator[None]:
        try:
            yield
        except CheckpointError as error:
            if str(self.path) in str(error):
                raise
            raise CheckpointError(f"{self.path}: the tensor {name}: {error}") from error
        except ValueError as error:
            raise CheckpointError(
                f"{self.path}: the tensor {name} is corrupt ({error}); write it again with `lors prune`"
            ) from error


def write(
    path: str | Path,
    deltas: Iterable[tuple[str, PrunedDelta]],  # all in one dtype, in any order
    *,
    base_digest: str,
    settings: PruneSettings | None,
    provenance: Mapping[str, Any] | None = None,  # anything JSON
) -> DeltaFile:
    """Write a task vector to one file, which appears (or replaces another) in one rename.

    One tensor is in memory at a time. The same arguments give the same bytes, whatever the order of the deltas.
    Raises InputError where `path` cannot be written.
    """
    path = Path(path)
    partial = path.absolute().parent / f".{path.name}.{uuid.uuid4().hex[:8]}.partial"
    sections: Sections = {4: {}, 2: {}, 1: {}}
    starts: dict[str, int] = {}  # in its spool
    tensors: dict[str, dict[str, Any]] = {}
    dtypes: set[Dtype] = set()
    with ExitStack() as stack:
        with writing(path):
            partial.parent.mkdir(parents=True, exist_ok=True)
            # The header goes first and holds every offset, so the data waits in nameless files until the last tensor is
            # known: one for each size of an entry, the largest first, so that each lies at a multiple of its size.
            spools = {
                size: stack.enter_context(tempfile.TemporaryFile(dir=partial.parent, buffering=0)) for size in sections
            }
        for name, delta in deltas:
            assert name not in tensors, f"{name} given twice"
            tensors[name] = _facts(delta)
            dtypes.add(delta.dtype)
            for part, tensor in delta.parts().items():
                sections[tensor.itemsize][f"{name}/{part}"] = tensor.dtype, tuple(tensor.shape)
                starts[f"{name}/{part}"] = spools[tensor.itemsize].tell()
                with writing(path):
                    _write(spools[tensor.itemsize], tensor)
        assert len(dtypes) < 2, f"a file of {sorted(dtypes)}"
        sections = {size: dict(sorted(section.items())) for size, section in sections.items()}
        tensors = dict(sorted(tensors.items()))
        text = _header(sections, tensors, (dtypes or {"float32"}).pop(), base_digest, settings, provenance or {})
        try:
            with writing(path), partial.open("wb") as stream:
                stream.write(text)
                for size, section in sections.items():
                    for key, (_, shape) in section.items():
                        spools[size].seek(starts[key])
                        _copy(spools[size], stream, prod(shape) * size)
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


def header_bytes(
    layout: Mapping[str, tuple[tuple[int, ...], Mapping[str, tuple[torch.dtype, tuple[int, ...]]]]],
    settings: PruneSettings,
) -> int:
    """An upper bound of what the header of a file takes, without provenance.

    `layout` says of each tensor its shape, and the dtype and shape of each of its parts.
    """
    sections: Sections = {4: {}, 2: {}, 1: {}}
    tensors = {}
    for name, (shape, parts) in layout.items():
        size, long = prod(shape), -sys.float_info.max  # no float has a longer text
        tensors[name] = {"shape": shape, "energy": long, "error": long, "retained_energy": long, "threshold": long}
        tensors[name] |= {"rank": size, "count": size}
        for part, (dtype, sides) in parts.items():
            sections[dtype.itemsize][f"{name}/{part}"] = dtype, sides
    return len(_header(sections, tensors, "bfloat16", "0" * 64, settings, {}))


Sections = dict[int, dict[str, tuple[torch.dtype, tuple[int, ...]]]]  # bytes of an entry -> key -> dtype, shape


def _header(
    sections: Sections,
    tensors: Mapping[str, Mapping[str, Any]],
    dtype: Dtype,
    base_digest: str,
    settings: PruneSettings | None,
    provenance: Mapping[str, Any],
) -> bytes:
    facts = {
        "format": FORMAT,
        "version": VERSION,
        "base": base_digest,
        "dtype": dtype,
        "settings": settings.model_dump(mode="json") if settings else None,
        "retained_energy": _retained(tensors.values()),
        "tensors": tensors,
        "provenance": dict(provenance),
    }
    header: dict[str, Any] = {"__metadata__": {"lors": json.dumps(facts, sort_keys=True)}}
    offset = 0
    for section in sections.values():
        for key, (kind, shape) in section.items():
            stop = offset + prod(shape) * kind.itemsize
            header[key] = {"dtype": HEADER_TYPES[kind], "shape": shape, "data_offsets": [offset, stop]}
            offset = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # safetensors aligns the data to 8 bytes
    return len(text).to_bytes(8, "little") + text


def _parsed(facts: Mapping[str, Any]) -> dict[str, Any]:
    """A tensor's own, by `PrunedDelta`'s names. Raises ValueError, KeyError or TypeError where they are broken."""
    shape, threshold = tuple(int(side) for side in facts["shape"]), facts.get("threshold")
    if min(shape, default=0) < 0:
        raise ValueError("a negative shape")
    own = {"shape": shape, "energy": float(facts["energy"]), "error": float(facts["error"])}
    return own if threshold is None else own | {"threshold": float(threshold), "count": int(facts["count"])}


def _facts(delta: PrunedDelta) -> dict[str, Any]:
    facts: dict[str, Any] = {"shape": delta.shape, "energy": delta.energy, "error": delta.error}
    facts["retained_energy"] = delta.retained_energy
    if delta.us is not None:
        facts["rank"] = delta.us.shape[1]
    if delta.indices or delta.threshold is not None:
        facts["count"] = delta.indices.count if delta.indices else delta.count
    if delta.threshold is not None:
        facts["threshold"] = delta.threshold
    return facts


def _retained(tensors: Iterable[Mapping[str, Any]]) -> float:
    energy, error = (sum(float(facts[key]) for facts in tensors) for key in ("energy", "error"))
    return 1.0 - error / energy if energy else 1.0


def _copy(source: FileIO, stream: BinaryIO, left: int) -> None:
    while left:
        content = source.read(min(left, COPY_BYTES))
        stream.write(content)
        left -= len(content)


def _write(stream: FileIO, tensor: torch.Tensor) -> None:
    if tensor.numel():
        flat = tensor.reshape(-1)
        data = (flat.view(torch.int16) if flat.dtype == torch.bfloat16 else flat).numpy().data.cast("B")
        while data:
            data = data[stream.write(data) :]


def _check(pruned: PrunedDelta, stored: torch.dtype) -> None:
    """Raises ValueError where the parts of a tensor do not belong together, or hold NaN or infinity."""
    parts = pruned.parts()
    rank = pruned.us.shape[-1] if pruned.us is not None else 0
    factor = torch.int8 if pruned.dtype == "int8" else stored
    expected = {"us": ((*(pruned.shape or (1,))[:1], rank), factor), "vh": ((rank, prod(pruned.shape[1:])), factor)}
    expected |= {"scale": ((rank,), torch.float32), "whole": (pruned.shape, stored)}
    expected |= {"values": ((pruned.indices.count if pruned.indices else 0,), stored)}
    for part in parts.keys() & expected.keys():
        if (tuple(parts[part].shape), parts[part].dtype) != expected[part]:
            raise ValueError(f"its part {part} is {list(parts[part].shape)} {parts[part].dtype}")
        if parts[part].is_floating_point() and not is_finite(parts[part]):
            raise ValueError(f"its part {part} holds NaN or infinity")
    together = [{"us", "vh"} | ({"scale"} if pruned.dtype == "int8" else set()), {"values", "indices"}]
    there = parts.keys() | ({"indices"} if pruned.indices else set())
    if any(0 < len(group & there) < len(group) for group in together):
        raise ValueError("one of its parts is missing")
    if pruned.threshold is not None and (pruned.us is None or not pruned.threshold > 0):
        raise ValueError("its threshold has no factors, or is not positive")
