"""The sparse component: the largest-magnitude entries of a tensor, exactly as many as asked for, and their indices."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["PackedIndices", "count_for", "packed_bytes", "top_k"]

# Entries a block -> (dtype of a position in it, dtype of the count of its positions). 255, so that a count fits a byte.
CODES: dict[int, tuple[type[np.unsignedinteger], type[np.unsignedinteger]]] = {
    255: (np.uint8, np.uint8),
    65536: (np.uint16, np.uint32),
}
MASK_BYTES = 4096  # bytes of a mask counted at once


def count_for(density: float, size: int) -> int:
    """How many of `size` entries a density in (0, 1] keeps: round(density * size), halves to even."""
    return round(density * size)


def top_k(
    tensor: torch.Tensor,  # any shape, float on the CPU, fewer than 2^31 entries
    count: int,  # 0 to the number of entries
) -> tuple[torch.Tensor, torch.Tensor]:  # (count,) int32 flat indices, rising; (count,) their values
    """The `count` entries of largest magnitude; among equal ones the lowest flat index is kept first.

    By the threshold from a partition: an argsort takes a hundred times as long on an embedding.
    """
    flat = tensor.numpy().reshape(-1)
    assert 0 <= count <= flat.size < 2**31, f"{count} of {flat.size} entries"
    if count in (0, flat.size):
        indices = np.arange(count, dtype=np.int32)
    else:
        magnitude = np.abs(flat)
        threshold = np.partition(magnitude, flat.size - count)[flat.size - count]
        kept = magnitude >= threshold
        if (over := int(np.count_nonzero(kept)) - count) > 0:
            kept[np.flatnonzero(magnitude == threshold)[-over:]] = False
        indices = np.flatnonzero(kept).astype(np.int32)
    return torch.from_numpy(indices), torch.from_numpy(flat[indices])


def packed_bytes(count: int, size: int) -> dict[int, int]:
    """What `count` of `size` indices take in each code: 0 for the mask, else the entries of a block; the best first."""
    found = {0: -(-size // 8)}
    for block, (position, counter) in CODES.items():
        found[block] = count * np.dtype(position).itemsize + -(-size // block) * np.dtype(counter).itemsize
    return dict(sorted(found.items(), key=lambda item: item[1]))


class PackedIndices:
    """A rising set of flat indices of a tensor of `size` entries, read in any range without unpacking the rest.

    Stored in the smallest of three exact codes, by density p: below 0.4 % `positions` (uint16) within blocks of 65536
    entries and the `counts` of each block; up to 12 % positions (uint8) within blocks of 255; else a bit `mask` (the
    lowest bit first). 32, 8 + 0.03 / p and 1 / p bits an index, so never above 2 bytes where it matters; an int32 is 4.
    """

    def __init__(
        self,
        parts: Mapping[str, torch.Tensor],  # mask (size / 8,) uint8; or positions (k,) and counts (blocks,)
        size: int,
    ) -> None:
        """Raises ValueError where the parts are no rising set of indices below `size`."""
        self._parts, self.size = dict(parts), size
        if "mask" in parts:
            self._block, data = 8 * MASK_BYTES, _array(parts, "mask", (-(-size // 8),), np.uint8)
            if size % 8 and data[-1] >> size % 8:
                raise ValueError("an index is out of range")
            padded = np.pad(np.bitwise_count(data), (0, -len(data) % MASK_BYTES))
            counts = padded.reshape(-1, MASK_BYTES).sum(axis=1, dtype=np.int64)
        else:
            wide = "positions" in parts and parts["positions"].dtype == torch.uint16
            self._block = 65536 if wide else 255
            position, counter = CODES[self._block]
            counts = _array(parts, "counts", (-(-size // self._block),), counter).astype(np.int64)
            data = _array(parts, "positions", (int(counts.sum()),), position)
        self._data = data
        self._first = np.concatenate([[0], counts.cumsum()])  # the ordinal of each block's first index
        self.count = int(self._first[-1])
        if "mask" not in parts:
            self._check_positions()

    def _check_positions(self) -> None:
        falls = np.flatnonzero(self._data[1:] <= self._data[:-1]) + 1
        starts = np.zeros(self.count + 1, bool)
        starts[self._first] = True
        if not starts[falls].all():
            raise ValueError("indices are not rising")
        last = np.flatnonzero(np.diff(self._first))  # blocks that hold any
        if last.size and (
            int(self._data.max()) >= self._block or last[-1] * self._block + int(self._data[-1]) >= self.size
        ):
            raise ValueError("an index is out of range")

    @classmethod
    def pack(
        cls,
        indices: torch.Tensor,  # (k,) int32, rising
        size: int,
    ) -> PackedIndices:
        """In the smallest code."""
        flat, block = indices.numpy(), next(iter(packed_bytes(indices.numel(), size)))
        if block == 0:
            bits = np.zeros(size, np.uint8)
            bits[flat] = 1
            return cls({"mask": torch.from_numpy(np.packbits(bits, bitorder="little"))}, size)
        position, counter = CODES[block]
        counts = np.bincount(flat // block, minlength=-(-size // block)).astype(counter)
        positions = (flat % block).astype(position)
        return cls({"positions": torch.from_numpy(positions), "counts": torch.from_numpy(counts)}, size)

    def parts(self) -> dict[str, torch.Tensor]:
        """The tensors to store."""
        return self._parts

    def between(self, start: int, stop: int) -> tuple[torch.Tensor, slice]:  # int64 indices less `start`, rising
        """The indices in [start, stop), and which ones of all they are: the slice of the values that belong to them."""
        first, last = start // self._block, -(-stop // self._block)
        if "mask" in self._parts:
            data = self._data[first * MASK_BYTES : last * MASK_BYTES]
            found = np.flatnonzero(np.unpackbits(data, bitorder="little")) + first * self._block
        else:
            counts = np.diff(self._first[first : last + 1])
            found = np.repeat(np.arange(first, first + len(counts)) * self._block, counts)
            found += self._data[self._first[first] : self._first[first + len(counts)]]
        low, high = np.searchsorted(found, (start, stop))
        skipped = int(self._first[first])
        return torch.from_numpy(found[low:high] - start), slice(skipped + int(low), skipped + int(high))

    def unpacked(self) -> torch.Tensor:
        """(k,) int32, flat, rising."""
        return self.between(0, self.size)[0].int()


def _array(
    parts: Mapping[str, torch.Tensor], name: str, shape: tuple[int, ...], dtype: type[np.unsignedinteger]
) -> npt.NDArray[np.unsignedinteger]:
    if name not in parts or tuple(parts[name].shape) != shape:
        raise ValueError(f"the {name} of its indices are missing or of another length")
    array: npt.NDArray[np.unsignedinteger] = parts[name].numpy()
    if array.dtype != dtype:
        raise ValueError(f"the {name} of its indices are {array.dtype}, not {np.dtype(dtype)}")
    return array
