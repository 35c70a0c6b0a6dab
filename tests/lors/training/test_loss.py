"""The loss against torch's own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from lors.training.loss import decoder_inputs, label_rows, token_loss


@given(
    st.integers(1, 5), st.integers(1, 40), st.integers(2, 30), st.sampled_from([0.0, 0.1, 0.7]), st.integers(0, 1000)
)
def test_loss_and_gradient_are_those_of_cross_entropy(b: int, t: int, v: int, smoothing: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = (5 * torch.randn(b, t, v, generator=generator)).requires_grad_()
    labels = torch.randint(0, v, (b, t), generator=generator)
    labels[torch.rand(b, t, generator=generator) < 0.3] = -100
    expected = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", label_smoothing=smoothing)
    (gradient,) = torch.autograd.grad(3 * expected, logits)
    found = token_loss(logits * 1.0, labels, smoothing)  # a copy: it overwrites what it is given
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5, abs=1e-5)
    (own,) = torch.autograd.grad(3 * found, logits)
    assert torch.allclose(own, gradient, rtol=1e-4, atol=1e-5)


def test_half_precision_logits_are_summed_in_float32() -> None:
    logits = (4 * torch.randn(2, 50, 400, generator=torch.Generator().manual_seed(0))).bfloat16().requires_grad_()
    labels = torch.arange(100).view(2, 50)
    found = token_loss(logits * 1.0, labels)
    assert found.dtype == torch.float32
    expected = cross_entropy(logits.detach().float().flatten(0, 1), labels.flatten(), reduction="sum")
    assert float(found.detach()) == pytest.approx(float(expected))
    (own,) = torch.autograd.grad(found, logits)
    assert own.dtype == torch.bfloat16


def test_only_labels_give_a_gradient() -> None:
    logits = torch.randn(1, 3, 7, requires_grad=True)
    loss = token_loss(logits * 1.0, torch.tensor([[4, -100, -100]]))
    loss.backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert logits.grad[0, 0].abs().max() > 0.01
    assert torch.equal(logits.grad[0, 1:], torch.zeros(2, 7))


def test_what_the_decoder_reads() -> None:
    labels = label_rows([(5, 6, 7), (8,)])
    assert labels.tolist() == [[5, 6, 7], [8, -100, -100]]
    assert decoder_inputs(labels, 1).tolist() == [[1, 5, 6], [1, 8, 1]]
    assert labels.tolist() == [[5, 6, 7], [8, -100, -100]]


def test_the_gradient_takes_the_place_of_the_logits() -> None:
    """A Whisper's logits of a large batch are the largest tensor of all: no second one of their size."""
    logits = torch.randn(4, 16, 1000)
    leaf = torch.zeros(1, requires_grad=True)
    inside = logits + leaf
    place = inside.data_ptr()
    seen: list[int] = []
    inside.register_hook(lambda gradient: seen.append(gradient.data_ptr()))
    token_loss(inside, torch.zeros(4, 16, dtype=torch.long)).backward()  # type: ignore[no-untyped-call]
    assert seen == [place]
