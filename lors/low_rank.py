"""The low-rank component: the best rank-r approximation of a delta (Eckart and Young 1936)."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["load_lapack", "rank_for", "retained_energy", "squared_norm", "truncated_svd"]

# Measured on one core at 512, 768 and 1280: below a fifth of the short side MRRR on the top r beats divide and conquer.
PARTIAL_BELOW = 0.2
BLOCK = 8192  # columns of the long side taken to float64 at once, so that an embedding is never copied whole


def rank_for(ratio: float, shape: tuple[int, int]) -> int:
    """The rank of an (m, n) matrix at rank_ratio in (0, 1]: max(1, round(ratio * min(m, n))), halves to even."""
    return max(1, round(ratio * min(shape)))


def truncated_svd(
    delta: torch.Tensor,  # (m, n) float32, finite, not empty, on any device that has float64
    rank: int,  # r, 1 to min(m, n)
) -> tuple[torch.Tensor, torch.Tensor]:  # (m, r) U * S, and (r, n) Vh, float32 on its device, singular values falling
    """The rank-r truncated SVD, exact to about 1e-7 of the norm, as the two factors whose product it is.

    U * S is one tensor because that is all that a merge reads; S is its columns' norms.
    By the eigenvectors of the Gram matrix of the short side, in float64, and a projection on them: 2 to 15 times faster
    than an SVD. The largest entry of each singular vector of the short side is positive, so that the signs are defined.
    """
    wide = delta.shape[0] <= delta.shape[1]
    short = delta if wide else delta.T  # (k, l), k <= l
    k = short.shape[0]
    assert 1 <= rank <= k, f"rank {rank} of a {tuple(delta.shape)} matrix"
    eigenvectors = _lapack_eigenvectors if delta.device.type == "cpu" else _torch_eigenvectors
    vectors = eigenvectors(short, rank)
    largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    vectors = torch.where(largest < 0, -vectors, vectors).float()
    projected = vectors.T @ short  # (r, l): S times the long side's singular vectors
    if not wide:
        return projected.T.contiguous(), vectors.T.contiguous()
    norms = torch.linalg.vector_norm(projected, dim=1, dtype=torch.float64).float()
    return (vectors * norms).contiguous(), projected / torch.where(norms > 0, norms, 1)[:, None]


def _lapack_eigenvectors(
    short: torch.Tensor,  # (k, l) float32 on the CPU
    rank: int,  # r
) -> torch.Tensor:  # (k, r) float64: the leading eigenvectors of short @ short.T
    matrix = short.numpy()
    k = len(matrix)
    gram = np.zeros((k, k))
    for start in range(0, matrix.shape[1], BLOCK):
        block = matrix[:, start : start + BLOCK].astype(np.float64)
        gram += block @ block.T  # numpy sees the symmetry and computes one half
    vectors = _leading(gram, rank) if rank < PARTIAL_BELOW * k else np.linalg.eigh(gram)[1][:, -rank:]
    return torch.from_numpy(vectors[:, ::-1].copy())


def _leading(
    matrix: npt.NDArray[np.float64],  # (k, k), symmetric; overwritten
    rank: int,  # r
) -> npt.NDArray[np.float64]:  # (k, r): the eigenvectors of the largest eigenvalues, the largest last
    """Tridiagonal form, MRRR on its r largest eigenvalues, and back: LAPACK's dsyevr by its parts, a fifth faster."""
    k = len(matrix)
    diagonal, beside, tau, values, nothing = np.empty(k), np.empty(k), np.empty(k), np.empty(k), np.zeros(1)
    vectors, work = np.empty((rank, k)), np.empty(64 * k + 4160)  # rows for LAPACK's columns
    support, room = np.empty(2 * rank, np.intc), np.empty(10 * k, np.intc)
    size, least, most, length, places, found = (
        np.array([number], np.intc) for number in (k, k - rank + 1, rank, len(work), len(room), 0)
    )
    _lapack("dsytrd", b"L", size, matrix, size, diagonal, beside, tau, work, length)
    _lapack(
        "dstemr", b"V", b"I", size, diagonal, beside, nothing, nothing, least, size, found, values, vectors, size, most,
        support, np.ones(1, np.intc), work, length, room, places,
    )  # fmt: skip
    _lapack("dormtr", b"L", b"L", b"N", size, most, matrix, size, tau, vectors, size, work, length)
    return vectors.T


def _lapack(name: str, *arguments: Any) -> None:
    failed = np.zeros(1, np.intc)
    values = (a if isinstance(a, bytes) else a.ctypes.data for a in (*arguments, failed))
    load_lapack(name, len(arguments) + 1)(*values)
    assert not failed[0], f"LAPACK's {name} failed with {failed[0]}"


@cache
def load_lapack(name: str = "dsytrd", arguments: int = 10) -> Callable[..., None]:
    """A function of scipy's LAPACK, which other threads run beside: scipy's own wrappers keep Python's lock.

    Whoever limits the threads of BLAS calls it before, as the limit holds for what is loaded.
    """
    from scipy.linalg import cython_lapack  # 0.1 s that a merge without a decomposition need not wait for

    capsule = cython_lapack.__pyx_capi__[name]
    name_of, pointer_of = ctypes.pythonapi.PyCapsule_GetName, ctypes.pythonapi.PyCapsule_GetPointer
    name_of.restype, name_of.argtypes = ctypes.c_char_p, [ctypes.py_object]
    pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * arguments)(pointer_of(capsule, name_of(capsule)))


def _torch_eigenvectors(
    short: torch.Tensor,  # (k, l) float32 on any device
    rank: int,  # r
) -> torch.Tensor:  # (k, r) float64, on its device: the leading eigenvectors of short @ short.T
    blocks = (short[:, start : start + BLOCK].double() for start in range(0, short.shape[1], BLOCK))
    gram = sum((block @ block.T for block in blocks), torch.zeros((), dtype=torch.float64, device=short.device))
    return torch.linalg.eigh(gram)[1][:, -rank:].flip(1)  # type: ignore[no-any-return]


def retained_energy(
    delta: torch.Tensor,  # any shape
    kept: torch.Tensor,  # same shape: what pruning leaves of it
) -> float:
    """1 - |delta - kept|^2 / |delta|^2 (Frobenius), 1 for a delta of zeros.

    For a truncated SVD this is the sum of the kept squared singular values over all of them.
    """
    energy = squared_norm(delta)
    return 1.0 - squared_norm(delta - kept) / energy if energy else 1.0


def squared_norm(tensor: torch.Tensor) -> float:
    """Sum of squares, accumulated in float64."""
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2
