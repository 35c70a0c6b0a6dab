"""Truncated SVD of deltas: time and distance to the optimum, ours against torch.linalg.svd, in one run.

    OMP_NUM_THREADS=1 python benchmarks/svd.py [--threads 1] [--quick]

The distance is |ours - A_r| / |A| (Frobenius) to the best rank-r matrix A_r of a float64 SVD, for both routes. The
singular values fall as i^-0.5, about as slowly as those of fine-tuned Whispers. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial

import torch

from lors.low_rank import rank_for, truncated_svd

SHAPES = [(512, 512), (768, 768), (768, 3072), (1280, 1280), (1280, 5120), (51865, 768)]
RATIOS = [0.02, 0.05, 0.1, 0.2]
SECONDS = 2.0  # at least so long, or three times, is each measured


def decaying(m: int, n: int) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """An (m, n) float32 matrix and its float64 SVD."""
    generator = torch.Generator().manual_seed(m + n)
    k = min(m, n)
    left, right = (torch.linalg.qr(torch.randn(side, k, generator=generator))[0] for side in (m, n))
    matrix = (left * torch.arange(1, k + 1) ** -0.5) @ right.T * 1e-3
    return matrix, torch.linalg.svd(matrix.double(), full_matrices=False)


def seconds(run: Callable[[], object]) -> float:
    """The fastest of several runs."""
    best, spent, runs = float("inf"), 0.0, 0
    while runs < 3 and spent < SECONDS:
        started = time.perf_counter()
        run()
        took = time.perf_counter() - started
        best, spent, runs = min(best, took), spent + took, runs + 1
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="the two smallest shapes alone")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: list[dict[str, object]] = []
    worst = 0.0
    print(
        f"{'shape':>14} {'ratio':>6} {'rank':>5} {'ours ms':>9} {'torch ms':>9} {'ratio':>6} {'ours':>9} {'torch':>9}"
    )
    for m, n in SHAPES[:2] if options.quick else SHAPES:
        matrix, (u, s, vh) = decaying(m, n)
        norm = torch.linalg.vector_norm(s)
        full = torch.linalg.svd(matrix, full_matrices=False)
        full_seconds = seconds(partial(torch.linalg.svd, matrix, full_matrices=False))
        for ratio in RATIOS:
            rank = rank_for(ratio, (m, n))
            took = seconds(partial(truncated_svd, matrix, rank))
            ours = truncated_svd(matrix, rank)
            theirs = full[0][:, :rank] * full[1][:rank], full[2][:rank]
            # Of two products of rank r, without the (m, n) matrices: by a QR of the factors side by side.
            distances = [
                distance((u[:, :rank] * s[:rank], vh[:rank]), (us.double(), v.double())) / float(norm)
                for us, v in (ours, theirs)
            ]
            row = {"shape": [m, n], "rank_ratio": ratio, "rank": rank, "seconds": took, "torch_seconds": full_seconds}
            rows.append(
                row | {"times_faster": full_seconds / took, "distance": distances[0], "torch_distance": distances[1]}
            )
            print(
                f"{f'{m}x{n}':>14} {ratio:6.2f} {rank:5d} {took * 1e3:9.1f} {full_seconds * 1e3:9.1f} "
                f"{full_seconds / took:6.1f} {distances[0]:9.1e} {distances[1]:9.1e}",
                flush=True,
            )
            worst = max(worst, distances[0])
    print(json.dumps({"threads": options.threads, "worst_distance": worst, "rows": rows}))


def distance(
    one: tuple[torch.Tensor, torch.Tensor],  # (m, r) and (r, n)
    other: tuple[torch.Tensor, torch.Tensor],  # (m, r) and (r, n)
) -> float:
    """Frobenius norm of the difference of two products."""
    left = torch.linalg.qr(torch.cat([one[0], -other[0]], dim=1))[1]
    right = torch.linalg.qr(torch.cat([one[1], other[1]]).T)[1]
    return float(torch.linalg.matrix_norm(left @ right.T))


if __name__ == "__main__":
    main()
