"""Linear layers in oneDNN's layout: the same products, and nothing left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from lors.speech.load import load_model
from lors.speech.packed import packed_linears


@pytest.mark.parametrize("rows", [1, 3, 200])
def test_the_products_are_the_same(rows: int, whisper_folder: Path) -> None:
    model, _ = load_model(whisper_folder)
    model.double()
    layers = [layer for layer in model.modules() if type(layer) is nn.Linear]
    given = {layer.in_features: torch.randn(2, rows, layer.in_features, dtype=torch.float64) for layer in layers}
    with torch.inference_mode():
        exact = [layer(given[layer.in_features]) for layer in layers]
        model.float()
        with packed_linears(model):
            assert all("forward" in layer.__dict__ for layer in layers)
            found = [layer(given[layer.in_features].float()) for layer in layers]
        assert not any("forward" in layer.__dict__ for layer in layers)
    for own, other in zip(found, exact, strict=True):
        torch.testing.assert_close(own.double(), other, rtol=1e-5, atol=1e-5)


def test_another_type_and_an_error_leave_the_layers_alone(whisper_folder: Path) -> None:
    model, _ = load_model(whisper_folder)
    with packed_linears(model.to(torch.bfloat16)):
        assert not any("forward" in module.__dict__ for module in model.modules())
    with pytest.raises(KeyboardInterrupt), packed_linears(model.float()):
        raise KeyboardInterrupt
    assert not any("forward" in module.__dict__ for module in model.modules())
