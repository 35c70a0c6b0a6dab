from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lors.checkpoint import Checkpoint
from lors.errors import CheckpointError
from lors.task_vector import TaskVector, apply, extract

floats = hnp.arrays(np.float32, st.integers(0, 20), elements=st.floats(-100, 100, width=32, allow_subnormal=False))


@given(floats, st.integers(0, 2**32 - 1))
def test_base_plus_delta_is_the_expert_within_one_ulp_of_the_larger(base, seed):
    expert = (base + np.random.default_rng(seed).normal(0, 0.01, base.shape)).astype(np.float32)
    delta = torch.from_numpy(expert) - torch.from_numpy(base)
    back = apply(torch.from_numpy(base), delta, 1.0).numpy()
    assert (np.abs(back - expert) <= np.spacing(np.maximum(np.abs(base), np.abs(expert)))).all()


@given(floats, st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
def test_scaling_zero_is_the_base_bit_for_bit(values, dtype):
    base = torch.from_numpy(np.concatenate([values, np.float32([-0.0])])).to(dtype)
    out = apply(base, torch.ones(base.shape), 0.0)
    assert out.dtype == dtype
    assert bytes(out.view(torch.uint8).numpy().data) == bytes(base.view(torch.uint8).numpy().data)


def test_apply_rounds_once():
    base = torch.tensor([1.0], dtype=torch.bfloat16)  # one ulp is 1/128: a delta rounded first would give another sum
    assert apply(base, torch.tensor([0.01]), 0.5).item() == torch.tensor(1.005).bfloat16().item()
    assert apply(torch.tensor([1.0], dtype=torch.float64), torch.tensor([2.0**-40]), 1.0).item() == 1 + 2.0**-40


def test_extract_then_apply_gives_the_expert(tiny_whisper_folder):
    base = Checkpoint(tiny_whisper_folder(0, dtype=torch.float16))
    expert = Checkpoint(tiny_whisper_folder(1, dtype=torch.float16))
    deltas = dict(extract(base, expert))
    assert tuple(deltas) == base.float_names
    for name, delta in deltas.items():
        assert delta.dtype == torch.float32
        assert torch.equal(delta, expert.tensor(name).float() - base.tensor(name).float())
        # Where the expert's value is far below the base's, its last bit can be lost in the float32 difference.
        assert torch.allclose(
            apply(base.tensor(name), delta, 1.0).float(), expert.tensor(name).float(), rtol=1e-3, atol=1e-7
        )


def test_refuses_nan_by_tensor_and_model(tensor_folder):
    good = Checkpoint(tensor_folder("good", {"a": torch.ones(2), "b": torch.ones(2)}))
    bad = Checkpoint(tensor_folder("bad", {"a": torch.ones(2), "b": torch.tensor([1.0, float("nan")])}))
    deltas = extract(good, bad)
    assert next(deltas)[0] == "a"
    with pytest.raises(CheckpointError, match="bad: the tensor b holds NaN"):
        next(deltas)
    with pytest.raises(CheckpointError, match="bad: the tensor b holds NaN"):
        TaskVector(bad, good).delta("b")


def test_refuses_other_shapes_and_buffers_that_differ(tensor_folder):
    base = Checkpoint(tensor_folder("base", {"a": torch.ones(2), "ids": torch.arange(3)}))
    same = Checkpoint(tensor_folder("same", {"a": torch.ones(2), "ids": torch.arange(3)}))
    assert [name for name, _ in extract(base, same)] == ["a"]
    with pytest.raises(CheckpointError, match=r"the tensor ids \(torch.int64\) differs"):
        extract(base, Checkpoint(tensor_folder("ids", {"a": torch.ones(2), "ids": torch.arange(3) + 1})))
    with pytest.raises(CheckpointError, match=r"the tensor a is \[3\] in wide but \[2\] in base"):
        extract(base, Checkpoint(tensor_folder("wide", {"a": torch.ones(3), "ids": torch.arange(3)})))
