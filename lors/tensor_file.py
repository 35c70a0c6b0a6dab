"""One safetensors file by rows: read without loading it, written without holding it, checked byte for byte."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from lors.errors import CheckpointError, InputError

__all__ = ["Entry", "TensorFile", "read_header", "read_rows", "reading"]

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
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Entry(NamedTuple):
    """A tensor in a file."""

    file: Path
    offset: int  # of its first byte in the file
    shape: tuple[int, ...]
    dtype: torch.dtype


def read_header(file: Path) -> tuple[dict[str, str], dict[str, Entry]]:
    """The metadata and the tensors of a file. Raises CheckpointError: corrupt, cut off, or of a quantised dtype."""
    with reading(file), safe_open(file, framework="pt"), file.open("rb") as stream:  # safe_open checks the whole header
        length = int.from_bytes(stream.read(8), "little")
        header: dict[str, Any] = json.loads(stream.read(length))
    metadata = header.pop("__metadata__", {})
    entries = {}
    for name, part in header.items():
        if part["dtype"] not in DTYPES:
            raise CheckpointError(
                f"the tensor {name} in {file} is {part['dtype']}, a quantised dtype; give the model before quantisation"
            )
        offset = 8 + length + part["data_offsets"][0]
        entries[name] = Entry(file, offset, tuple(part["shape"]), DTYPES[part["dtype"]])
    return metadata, entries


def read_rows(entry: Entry, start: int, stop: int) -> torch.Tensor:
    """Rows [start, stop) of the first dimension, in the stored dtype: a copy, which may be written into.

    A tensor of no dimensions has one row, itself. Raises CheckpointError where the file has changed meanwhile.
    """
    file, offset, shape, dtype = entry
    rows = torch.empty((stop - start, *shape[1:]), dtype=dtype)
    buffer = memoryview(rows.view(-1).view(torch.uint8).numpy().data if rows.numel() else b"")
    first = offset + start * prod(shape[1:]) * dtype.itemsize
    # Read and not mapped: a file that is cut off while it is read is an error here and a crash there.
    with reading(file):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            done = 0
            while done < len(buffer):
                if not (count := os.preadv(descriptor, [buffer[done:]], first + done)):
                    raise OSError("it ends too early")
                done += count
        finally:
            os.close(descriptor)
    return rows


class TensorFile:
    """A safetensors file that is being written: its header first, rows at their places from any thread, then a check.

    The space is allocated at once, so that a disk that is too small is known before anything is computed. Raises
    OSError; `close` raises InputError where a byte does not come back as it was written.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path = path
        self._sums: dict[int, tuple[int, int]] = {}  # offset -> bytes, CRC-32
        self._offsets: dict[str, int] = {}
        header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
        end = 0
        # Wide dtypes first, so that every tensor is aligned to its own.
        for name in sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, name)):
            dtype, shape = tensors[name]
            self._offsets[name], end = end, end + prod(shape) * dtype.itemsize
            header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [self._offsets[name], end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._start = 8 + len(text)
        self._stream = path.open("w+b", buffering=0)
        try:
            os.posix_fallocate(self._stream.fileno(), 0, self._start + end)
            self._put(0, len(text).to_bytes(8, "little") + text)
        except BaseException:
            self._stream.close()
            raise

    def write(self, name: str, start: int, rows: torch.Tensor) -> None:
        """Write rows, in the dtype announced, as the tensor's from row `start` on."""
        if rows.numel():
            offset = self._start + self._offsets[name] + start * rows[0].numel() * rows.element_size()
            self._put(offset, rows.contiguous().view(-1).view(torch.uint8).numpy().data)

    def _put(self, offset: int, content: bytes | memoryview) -> None:
        self._sums[offset] = (len(content), zlib.crc32(content))
        done = 0
        while done < len(content):
            done += os.pwrite(self._stream.fileno(), content[done:], offset + done)

    def close(self) -> str:
        """Sync the file, read every byte back and compare; returns its sha256, hexadecimal."""
        digest = hashlib.sha256()
        with self._stream:
            descriptor = self._stream.fileno()
            os.fsync(descriptor)
            for offset, (length, checksum) in sorted(self._sums.items()):
                content = os.pread(descriptor, length, offset)
                digest.update(content)
                if zlib.crc32(content) != checksum:
                    raise InputError(
                        f"what was written to {self.path.name} at byte {offset} reads back otherwise; check the disk"
                    )
        return digest.hexdigest()

    def abandon(self) -> None:
        """Close the file as it is; the caller removes it."""
        self._stream.close()


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Turns a failed read into the user's CheckpointError naming `file`."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} cannot be read as safetensors ({error}); it is corrupt or cut off: copy it again"
        ) from error
