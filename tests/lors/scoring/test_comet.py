"""COMET from a folder, against what unbabel-comet 2.2.7 gives for the same small model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from comet_folders import comet_folder
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from lors.errors import InputError
from lors.scoring.comet import _sparsemax, comet_scores, comet_signature

SOURCES = ["la casa es pequeña", "un perro duerme", "la casa", "un perro duerme"]
HYPOTHESES = ["the house is small", "a dog is small", "the", ""]
REFERENCES = ["the house is small", "a dog sleeps", "the house", "a dog sleeps"]

# What unbabel-comet 2.2.7's own modules gave for `comet_folder` and these texts, on torch 2.13.
GOLDEN = {
    "sparsemax avg": [-1.170795, -1.214872, -1.224982, -1.379321],
    "softmax max": [-1.228254, -1.091667, -1.289665, -1.2082],
    "softmax cls": [-0.882027, -0.886838, -0.885636, -0.894176],
}


@pytest.mark.parametrize("mixture", ["sparsemax avg", "softmax max", "softmax cls"])
def test_scores_are_those_of_unbabel_comet(mixture: str, tmp_path: Path) -> None:
    transformation, pool = mixture.split()
    folder = comet_folder(tmp_path, layer_transformation=transformation, pool=pool)
    done: list[tuple[int, int]] = []
    found = comet_scores(
        folder, SOURCES, HYPOTHESES, REFERENCES, batch=3, on_progress=lambda *state: done.append(state)
    )
    assert found == pytest.approx(GOLDEN[mixture], abs=1e-5)
    assert done[-1] == (9, 9)  # different texts
    one_by_one = [
        comet_scores(folder, [s], [h], [r])[0] for s, h, r in zip(SOURCES, HYPOTHESES, REFERENCES, strict=True)
    ]
    assert one_by_one == pytest.approx(found, abs=1e-5)
    assert comet_scores(folder, [], [], []) == []


def test_the_signature_tells_models_apart(tmp_path: Path) -> None:
    signature = comet_signature(comet_folder(tmp_path))
    assert signature.startswith("COMET|regression_metric|xlm-roberta-large|sha256:")
    tensors = {"x": torch.zeros(1)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert comet_signature(tmp_path) != signature


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=8))
def test_sparsemax_is_the_projection_onto_the_simplex(weights: list[float]) -> None:
    given_weights = torch.tensor(weights, dtype=torch.float64)
    found = _sparsemax(given_weights)
    assert found.sum().item() == pytest.approx(1)
    assert (found >= 0).all()
    # Optimal: all kept weights lose the same, and none that is dropped was above that.
    loss = (given_weights - found)[found > 0]
    assert (loss.max() - loss.min()).item() == pytest.approx(0, abs=1e-9)
    assert (given_weights <= loss.max() + found + 1e-9).all()


def test_what_is_no_such_model_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no hparams.yaml: docs/evaluation.md says how to make the folder"):
        comet_signature(tmp_path)
    comet_folder(tmp_path, class_identifier="referenceless_regression_metric")
    with pytest.raises(InputError, match=r"is a referenceless_regression_metric on XLM-RoBERTa; take a"):
        comet_scores(tmp_path, SOURCES, HYPOTHESES, REFERENCES)
    comet_folder(tmp_path, layer_norm=True)
    with pytest.raises(InputError, match=r"layer_norm True, which is not computed here"):
        comet_signature(tmp_path)
    for text in ("- 1\n", "pool: 2026-13-01\n"):
        (tmp_path / "hparams.yaml").write_text(text)
        with pytest.raises(InputError, match=r"is not the settings of a COMET model"):
            comet_signature(tmp_path)
    comet_folder(tmp_path)
    with pytest.raises(InputError, match=r"1 sources, 0 translations and 0 references"):
        comet_scores(tmp_path, ["a"], [], [])
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"cannot be loaded \(.+\): make the folder again"):
        comet_scores(tmp_path, ["a"], ["b"], ["c"])
