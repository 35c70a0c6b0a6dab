from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lors.checkpoint import Checkpoint
from lors.errors import CheckpointError, InputError
from lors.merging import METHODS, combine_files, get_method
from lors.merging.registry import expert_weights
from lors.task_vector import TaskVector


def arrays(count: int, seed: int) -> list[torch.Tensor]:
    rng = np.random.default_rng(seed)
    return [torch.from_numpy(rng.normal(size=(3, 4)).astype(np.float32)) for _ in range(count)]


weight_lists = st.lists(st.floats(0.1, 3), min_size=1, max_size=5)


@given(weight_lists, st.integers(0, 99))
def test_formulas(weights, seed):
    deltas = arrays(len(weights), seed)
    originals = [delta.clone() for delta in deltas]
    total = sum(w * d.double().numpy() for w, d in zip(weights, deltas, strict=True))
    for name in ("task_arithmetic", "lors"):
        assert np.allclose(get_method(name).combine(deltas, weights), total, rtol=1e-5, atol=1e-5)
    assert np.allclose(
        get_method("weight_average").combine(deltas, weights), total / sum(weights), rtol=1e-5, atol=1e-5
    )
    assert all(map(torch.equal, deltas, originals))  # inputs may be mapped files: never written to


@pytest.mark.parametrize("name", ["weight_average", "task_arithmetic", "lors"])
def test_one_expert_of_weight_one_is_itself(name):
    delta = arrays(1, 0)[0]
    assert torch.equal(get_method(name).combine([delta], [1.0]), delta)


def test_registry():
    assert list(METHODS) == sorted(METHODS)
    assert {"weight_average", "task_arithmetic", "lors"} <= METHODS.keys()
    assert [name for name, method in METHODS.items() if method.prunes] == ["lors"]
    assert not METHODS["weight_average"].searches_scaling
    for name, method in METHODS.items():
        assert method.name == name
        assert "arXiv" in method.reference
    with pytest.raises(InputError, match=r"no merging method 'task_arithmetics'; did you mean task_arithmetic\?"):
        get_method("task_arithmetics")


def test_weights():
    experts = {"fr": 0, "es": 0}
    assert list(expert_weights(experts, {"fr": 2}).items()) == [("es", 1.0), ("fr", 2.0)]
    with pytest.raises(InputError, match="'de' belongs to no expert; the experts are es, fr"):
        expert_weights(experts, {"de": 1})
    with pytest.raises(InputError, match="'es' is nan"):
        expert_weights(experts, {"es": float("nan")})
    with pytest.raises(InputError, match="sum to 0"):
        get_method("weight_average").combine(arrays(2, 0), [1, -1])


@pytest.mark.parametrize("name", ["weight_average", "task_arithmetic", "lors"])
def test_the_order_of_experts_does_not_change_a_bit(tiny_whisper_folder, name):
    base = Checkpoint(tiny_whisper_folder(0))
    vectors = {f"e{seed}": TaskVector(base, Checkpoint(tiny_whisper_folder(seed))) for seed in (1, 2, 3)}
    weights = {"e2": 0.3}
    one = dict(combine_files(base, vectors, get_method(name), weights))
    two = dict(combine_files(base, dict(reversed(vectors.items())), get_method(name), weights))
    assert tuple(one) == base.float_names
    for key in one:
        assert torch.equal(one[key], two[key])


def test_refuses_a_task_vector_of_other_tensors(tensor_folder):
    base = Checkpoint(tensor_folder("base", {"a": torch.ones(2), "b": torch.ones(2)}))
    less = Checkpoint(tensor_folder("less", {"a": torch.ones(2)}))
    wide = Checkpoint(tensor_folder("wide", {"a": torch.ones(2), "b": torch.ones(3)}))
    method = get_method("task_arithmetic")
    with pytest.raises(CheckpointError, match="the task vector x has no tensor b"):
        next(combine_files(base, {"x": TaskVector(less, less)}, method))
    with pytest.raises(CheckpointError, match="less has no tensor b"):
        next(combine_files(less, {"x": TaskVector(base, base)}, method))
    with pytest.raises(CheckpointError, match=r"the tensor b is \[3\] in x but \[2\] in base"):
        list(combine_files(base, {"x": TaskVector(wide, wide)}, method))
