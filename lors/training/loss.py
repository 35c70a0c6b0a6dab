"""Cross-entropy on the logits of any decoder, without further copies of them.

Shapes: B utterances, T tokens, V vocabulary. A Whisper writes 51865 logits a token, so each copy of them counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["IGNORED", "decoder_inputs", "divergence", "label_rows", "token_loss"]

IGNORED = -100
# Rows that are in float32 at once: 64 of Whisper's are 13 MB.
_ROWS = 64


def label_rows(labels: Sequence[Sequence[int]]) -> Tensor:
    """(B, T) with `IGNORED`, which the loss leaves out, after each target's end."""
    longest = max(len(row) for row in labels)
    return torch.tensor([[*row, *[IGNORED] * (longest - len(row))] for row in labels])


def decoder_inputs(labels: Tensor, start: int) -> Tensor:
    """What the decoder reads, (B, T), to write `labels`, (B, T): the start token, then all labels but the last.

    After a target's end it reads the start token again, which no token before can see.
    """
    inputs = labels.roll(1, dims=1)
    inputs[:, 0] = start
    return inputs.masked_fill(inputs == IGNORED, start)


def token_loss(
    logits: Tensor,  # (B, T, V), of any float dtype; overwritten with its gradient in the backward pass
    labels: Tensor,  # (B, T), `IGNORED` where there is none
    smoothing: float = 0.0,  # the share of each target that is spread over the vocabulary (Szegedy et al. 2015, 7)
) -> Tensor:
    """The sum over tokens of the cross-entropy, computed in float32: a scalar."""
    loss: Tensor = _TokenLoss.apply(logits.flatten(0, 1), labels.flatten(), smoothing)  # type: ignore[no-untyped-call]
    return loss


class _TokenLoss(torch.autograd.Function):
    """`torch.nn.functional.cross_entropy` keeps log-probabilities and makes a gradient: two more float32 copies."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        total = logits.new_zeros((), dtype=torch.float32)
        for rows, targets in zip(torch.split(logits, _ROWS), torch.split(labels, _ROWS), strict=True):
            own = rows.float()
            said = own.gather(1, targets.clamp(min=0)[:, None])[:, 0]
            each = own.logsumexp(1) - (1 - smoothing) * said
            if smoothing:
                each -= smoothing * own.mean(1)
            total += each[targets != IGNORED].sum()
        ctx.save_for_backward(logits, labels)
        ctx.smoothing = smoothing
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        logits, labels = ctx.saved_tensors
        for rows, targets in zip(torch.split(logits, _ROWS), torch.split(labels, _ROWS), strict=True):
            own = rows.float().softmax(1)
            if ctx.smoothing:
                own -= ctx.smoothing / own.shape[1]
            own.scatter_add_(1, targets.clamp(min=0)[:, None], own.new_full((len(own), 1), ctx.smoothing - 1))
            own *= gradient * (targets != IGNORED)[:, None]
            rows.copy_(own)
        return logits, None, None


def divergence(
    logits: Tensor,  # (B, T, V), of any float dtype; overwritten with its gradient in the backward pass
    wanted: Tensor,  # (B, T, V), of any float dtype: without a gradient
    labels: Tensor,  # (B, T), `IGNORED` where there is no token
) -> Tensor:
    """The sum over tokens of KL(softmax(wanted) || softmax(logits)), computed in float32: a scalar."""
    found: Tensor = _Divergence.apply(logits.flatten(0, 1), wanted.flatten(0, 1), labels.flatten())  # type: ignore[no-untyped-call]
    return found


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, wanted: Tensor, labels: Tensor) -> Tensor:
        total = logits.new_zeros((), dtype=torch.float32)
        for rows, own, targets in _split(logits, wanted, labels):
            said, meant = rows.float().log_softmax(1), own.float().log_softmax(1)
            total += (meant.exp() * (meant - said)).sum(1)[targets != IGNORED].sum()
        ctx.save_for_backward(logits, wanted, labels)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        logits, wanted, labels = ctx.saved_tensors
        for rows, own, targets in _split(logits, wanted, labels):
            difference = rows.float().softmax(1) - own.float().softmax(1)
            rows.copy_(difference * gradient * (targets != IGNORED)[:, None])
        return logits, None, None


def _split(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(torch.split(tensor, _ROWS) for tensor in tensors), strict=True)
