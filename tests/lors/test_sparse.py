from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lors.sparse import PackedIndices, count_for, packed_bytes, top_k


@given(
    hnp.arrays(np.float32, hnp.array_shapes(min_dims=1, max_dims=3, max_side=8), elements=st.integers(-4, 4)),
    st.floats(0, 1),
)
def test_equals_a_stable_sort(values, density):
    count = count_for(density, values.size)
    indices, kept = top_k(torch.from_numpy(values), count)
    flat = values.reshape(-1)
    reference = np.sort(np.argsort(-np.abs(flat), kind="stable")[:count])  # ties: the lowest index first
    assert indices.dtype == torch.int32
    assert indices.tolist() == reference.tolist()
    assert kept.tolist() == flat[reference].tolist()


@pytest.mark.parametrize("count", [0, 1, 6])
def test_edges_and_strided_input(count):
    tensor = torch.arange(6.0).reshape(2, 3).T  # not contiguous; indices are those of the (3, 2) tensor
    indices, values = top_k(tensor, count)
    dense = torch.zeros(6).index_add(0, indices, values).reshape(3, 2)
    assert len(indices) == count
    assert torch.equal(dense, torch.where(tensor > 5 - count, tensor, 0))


def test_empty_and_count():
    assert [part.numel() for part in top_k(torch.empty(0, 4), 0)] == [0, 0]
    assert (count_for(0.1, 100), count_for(1.0, 7), count_for(0.1, 4)) == (10, 7, 0)


@st.composite
def index_sets(draw):
    """A size and a rising set of indices below it, of any density, with full and empty stretches."""
    size = draw(st.sampled_from([1, 7, 8, 254, 255, 256, 1000, 65535, 65536, 65537, 140_000]))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    chosen = rng.random(size) < draw(st.sampled_from([0.0, 1e-4, 0.003, 0.02, 0.1, 0.2, 1.0]))
    start = draw(st.integers(0, size))
    chosen[start : start + draw(st.integers(0, 600))] = draw(st.booleans())
    return size, np.flatnonzero(chosen).astype(np.int32)


@given(index_sets(), st.integers(0, 140_000), st.integers(0, 140_000))
def test_packing_is_exact_and_any_range_can_be_read(drawn, one, two):
    size, indices = drawn
    packed = PackedIndices.pack(torch.from_numpy(indices), size)
    assert packed.count == len(indices)
    assert packed.unpacked().dtype == torch.int32
    assert packed.unpacked().tolist() == indices.tolist()
    start, stop = sorted((one % (size + 1), two % (size + 1)))
    found, which = packed.between(start, stop)
    assert (found + start).tolist() == [i for i in indices if start <= i < stop]
    assert indices[which].tolist() == (found + start).tolist()
    sizes = packed_bytes(len(indices), size)
    assert sum(part.nbytes for part in packed.parts().values()) == min(sizes.values())
    again = PackedIndices(packed.parts(), size)
    assert again.unpacked().tolist() == indices.tolist()


@pytest.mark.parametrize(
    ("count", "code", "cost"), [(10, 65536, 28), (3000, 255, 3000 + 393), (20_000, 0, 12_500), (100_000, 0, 12_500)]
)
def test_the_smallest_code_is_taken(count, code, cost):
    assert next(iter(packed_bytes(count, 100_000).items())) == (code, cost)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({}, "missing"),
        ({"positions": torch.zeros(2, dtype=torch.uint8)}, "counts of its indices are missing"),
        ({"mask": torch.zeros(3, dtype=torch.uint8)}, "mask of its indices are missing or of another length"),
        ({"mask": torch.zeros(2, dtype=torch.int8)}, "mask of its indices are int8, not uint8"),
        ({"mask": torch.tensor([0, 16], dtype=torch.uint8)}, "out of range"),
        ({"positions": [3, 3], "counts": [2]}, "not rising"),
        ({"positions": [4, 3], "counts": [2]}, "not rising"),
        ({"positions": [12], "counts": [1]}, "out of range"),
        ({"positions": [255], "counts": [1]}, "out of range"),
        ({"positions": [3, 4], "counts": [1]}, "positions of its indices are missing or of another length"),
        ({"positions": [3, 4], "counts": [1, 1]}, "counts of its indices are missing or of another length"),
    ],
)
def test_refuses_what_is_no_set_of_indices(parts, message):
    tensors = {
        name: part if isinstance(part, torch.Tensor) else torch.tensor(part, dtype=torch.uint8)
        for name, part in parts.items()
    }
    with pytest.raises(ValueError, match=message):
        PackedIndices(tensors, 12)


def test_refuses_a_position_beyond_its_block():
    wide = {"positions": torch.tensor([9], dtype=torch.uint16), "counts": torch.tensor([0, 1], dtype=torch.uint32)}
    assert PackedIndices(wide, 65536 + 10).unpacked().tolist() == [65536 + 9]
    with pytest.raises(ValueError, match="out of range"):
        PackedIndices(wide, 65536 + 9)
