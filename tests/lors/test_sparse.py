from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lors.sparse import count_for, top_k


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
