"""Experts before a merge: the size, rank and place of their deltas, and where pairs of them meet.

Every figure exists by tensor, by layer, by part (encoder, embeddings, decoder) and over the model. Over several tensors

- norms, energies, cosine and both sign conflicts are exact: those of the tensors laid end to end;
- effective and stable rank are means over matrices weighted by the expert's energy in each;
- overlaps, chance and angles are means over matrices weighted by the product of the pair's norms in each;
- retained energy, interference and predicted loss are ratios of sums over matrices, each of which says how.

Tensors of three dimensions, (out, in, k), are matrices (out, in * k); vectors have no spectrum, so those figures are
NaN for them, as is whatever an all-zero delta leaves undefined.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import scipy.linalg
import scipy.special
import torch

from lors.blocks import as_rows, row_blocks
from lors.checkpoint import is_finite
from lors.diagnosis import PARTS, Diagnosis
from lors.errors import CheckpointError, InputError
from lors.groups import in_group
from lors.low_rank import rank_for, squared_norm

if TYPE_CHECKING:
    from lors.checkpoint import Checkpoint
    from lors.task_vector import Deltas

__all__ = [
    "Products",
    "Spectrum",
    "diagnose",
    "effective_rank",
    "inner_products",
    "predicted_loss",
    "principal_cosines",
    "spectrum",
    "task_interference",
]

CURVE = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0)  # rank ratios at which retained energy is drawn
NOISE = 1e-6  # singular values below this share of the largest are rounding errors of a float32 matrix
LONG = 8192  # columns of the long side taken to float64 at once

Array = np.ndarray[Any, np.dtype[np.float64]]


class Spectrum(NamedTuple):
    """A matrix (m, n) by its singular values, and its vectors up to rank r."""

    values: Array  # (k,) float64, k = min(m, n), falling, 0 where they are below NOISE of the largest
    left: torch.Tensor  # (m, r) float32, orthonormal columns
    right: torch.Tensor  # (n, r) float32, orthonormal columns; r is smaller where fewer values are above 0

    def retained(self, rank: int) -> float:
        """Sum of the `rank` largest squared singular values."""
        return float(np.square(self.values[:rank]).sum())


def spectrum(
    matrix: torch.Tensor,  # (m, n) float32, finite
    rank: int,  # the most singular vectors wanted
) -> Spectrum:
    """All singular values and the first singular vectors, by the float64 Gram matrix of the short side."""
    data = matrix.numpy()
    wide = data.shape[0] <= data.shape[1]
    short = data if wide else data.T  # (k, l), k <= l
    k, length = short.shape
    chunks = [slice(start, start + LONG) for start in range(0, length, LONG)]
    gram = np.zeros((k, k))
    for chunk in chunks:
        block = short[:, chunk].astype(np.float64)
        gram += block @ block.T
    energies, vectors = scipy.linalg.eigh(gram, driver="evd", check_finite=False)
    energies, vectors = energies[::-1], vectors[:, ::-1]
    values = np.sqrt(np.where(energies > NOISE**2 * max(energies[0], 0.0), energies, 0.0)) if k else np.zeros(0)
    r = min(rank, int(np.count_nonzero(values)))
    inner = np.ascontiguousarray(vectors[:, :r])
    outer = np.empty((length, r), dtype=np.float32)
    for chunk in chunks:
        outer[chunk] = short[:, chunk].astype(np.float64).T @ inner / values[:r]
    left, right = (inner.astype(np.float32), outer) if wide else (outer, inner.astype(np.float32))
    return Spectrum(values, torch.from_numpy(left), torch.from_numpy(right))


def effective_rank(values: Array) -> float:
    """exp of the entropy of the normalised singular values (Roy and Vetterli 2007, EUSIPCO, eq. 4); NaN for zeros."""
    if not values.any():
        return math.nan
    shares = values / values.sum()
    return float(np.exp(-scipy.special.xlogy(shares, shares).sum()))


class Products(NamedTuple):
    """Sums over the entries a, b of each two of N deltas; they add up over tensors. Each (N, N) float64."""

    dot: Array  # a * b
    absolute: Array  # |a * b|
    sign: Array  # sign(a) * sign(b)
    both: Array  # 1 where neither is 0


def inner_products(
    deltas: Sequence[torch.Tensor],  # N of one shape, float32, finite
) -> Products:
    """The four inner products that cosine and sign conflicts are made of, block of rows by block of rows."""
    products = Products(*(np.zeros((len(deltas), len(deltas))) for _ in Products._fields))
    for start, stop in row_blocks(tuple(deltas[0].shape)):
        rows = torch.stack([as_rows(delta)[start:stop].flatten() for delta in deltas])
        entries, signs = rows.double(), rows.sign()
        for product, factor in zip(products, (entries, entries.abs(), signs, signs.abs()), strict=True):
            product += (factor @ factor.T).numpy()
    return products


def principal_cosines(
    cross: Array,  # (r, s), Q_1' Q_2 of two orthonormal bases
) -> Array:  # (min(r, s),) falling, in [0, 1]
    """Cosines of the principal angles between two subspaces (Bjorck and Golub 1973, theorem 1)."""
    return np.clip(np.linalg.svd(cross, compute_uv=False), 0.0, 1.0)


def task_interference(
    left: Array,  # (r, s), U_1' U_2
    right: Array,  # (r, s), V_1' V_2
    first: Array,  # (r,) singular values of the first
    second: Array,  # (s,) of the second
) -> float:
    """How much of each truncated delta lies in the other's left and right subspaces, as a sum of two Frobenius norms.

    The two blocks of Singular Task Interference, (U'U - I) S (V'V - I) with the vectors and values of both deltas in U,
    S and V (Gargiulo et al. 2025, Task Singular Vectors, arXiv 2412.00081, sec. 3.3). That paper sums the magnitudes
    of their entries, which grows with r even for random subspaces; their norms are at most those of the deltas, which
    identical deltas reach, and 0 for orthogonal subspaces.
    """
    return float(np.linalg.norm((left * second) @ right.T) + np.linalg.norm((left.T * first) @ right))


def predicted_loss(
    other: Array,  # (r, r), U' D_j V: the partner's delta in the expert's top singular vectors
    values: Array,  # (r,) the expert's singular values, falling, positive
    scaling: float,
) -> float:
    """The share of what an expert gained that merging it with a partner is predicted to lose, for one matrix.

    A quadratic model of its loss around the expert, |A' X A'|^2 for a step X, with its own delta A in place of the
    curvature: the factors that K-FAC (Martens and Grosse 2015) takes from activations and gradients are spanned by
    what training added (Cheng et al. 2025, WUDI-Merging, arXiv 2503.08099, sec. 3, for the inputs). The step is from
    the expert to the merge, X = scaling * (A + D_j) - A, in the top-r subspaces; the unit is the step back to the base,
    X = -A. So 0 is harmless, 1 a return to the base; (1 - scaling)^2 without any partner.
    """
    shares = values / values[0]
    step = scaling * other / values[0] + np.diag((scaling - 1) * shares)
    return float(np.square(shares[:, None] * step * shares).sum() / np.power(shares, 6).sum())


def diagnose(
    base: Checkpoint,
    experts: Mapping[str, Deltas],  # id -> task vector on this base
    *,
    rank_ratios: Sequence[float] = (0.05, 0.1, 0.2),
    scaling: float = 0.5,
    on_progress: Callable[[int, int], None] | None = None,  # (parameters done, of all)
) -> Diagnosis:
    """Compare experts tensor by tensor; the deltas of one tensor are in memory at a time, with their top subspaces.

    Raises CheckpointError where an expert's tensors are not the base's or not finite; InputError without an expert,
    and for a rank ratio outside (0, 1].
    """
    ratios = tuple(sorted(set(rank_ratios)))
    if not experts:
        raise InputError("there is no expert to diagnose; give at least one")
    if not ratios or not 0 < ratios[0] <= ratios[-1] <= 1:
        raise InputError(f"the rank ratios are {list(rank_ratios)}; give shares of the full rank, above 0 and up to 1")
    ids = sorted(experts)
    tables = _Tables(ids, ratios, scaling)
    names = sorted(base.float_names, key=lambda name: (_order(name, base.shape(name)), name))
    total, done = sum(torch.Size(base.shape(name)).numel() for name in names), 0
    for expert in ids:
        if odd := sorted({*experts[expert].names} ^ {*names}):
            where = base.label if odd[0] in experts[expert].names else f"the task vector {expert}"
            raise CheckpointError(f"{where} has no tensor {odd[0]}; give a task vector extracted from this base")
    for name in names:
        deltas = [_delta(base, expert, experts[expert], name) for expert in ids]
        tables.add(name, base.shape(name), squared_norm(base.tensor(name).float()), deltas)
        done += deltas[0].numel()
        if on_progress:
            on_progress(done, total)
    return tables.finish(base.label)


def _delta(base: Checkpoint, expert: str, vector: Deltas, name: str) -> torch.Tensor:
    delta = vector.delta(name)
    if tuple(delta.shape) != base.shape(name):
        raise CheckpointError(
            f"the tensor {name} is {list(delta.shape)} in {expert} but {list(base.shape(name))} in {base.label}; "
            f"give a task vector extracted from this base"
        )
    if not is_finite(delta):
        raise CheckpointError(f"the delta of {name} in {expert} holds NaN or infinity; check the expert's training")
    return delta


class _Tables:
    """The rows by tensor as they come, and the sums over them in the end."""

    def __init__(self, ids: Sequence[str], ratios: tuple[float, ...], scaling: float) -> None:
        self.ids, self.ratios, self.scaling = ids, ratios, scaling
        self.curve = tuple(sorted({*CURVE, *ratios}))
        self.rows: dict[str, list[dict[str, Any]]] = {"experts": [], "spectra": [], "pairs": [], "subspaces": []}

    def add(self, name: str, shape: tuple[int, ...], base_energy: float, deltas: Sequence[torch.Tensor]) -> None:
        place = {"tensor": name, "layer": _layer(name), "part": _part(name, shape), "model": "model"}
        products = inner_products(deltas)
        spectra: list[Spectrum] = []
        if len(shape) > 1 and deltas[0].numel():
            matrices = [delta.reshape(shape[0], -1) for delta in deltas]
            side = (matrices[0].shape[0], matrices[0].shape[1])
            spectra = [spectrum(matrix, rank_for(self.ratios[-1], side)) for matrix in matrices]
        for i, expert in enumerate(self.ids):
            own = spectra[i] if spectra else None
            self._expert({**place, "expert": expert}, base_energy, float(products.dot[i, i]), own)
        for i, first in enumerate(self.ids):
            for j in range(i + 1, len(self.ids)):
                pair = {**place, "first": first, "second": self.ids[j]}
                self._pair(pair, products, i, j)
                if spectra and len(spectra[i].values) and spectra[i].values[0] > 0 < spectra[j].values[0]:
                    self._subspaces(pair, matrices, spectra, i, j)

    def _expert(self, place: dict[str, Any], base_energy: float, energy: float, own: Spectrum | None) -> None:
        row = place | {"energy": energy, "base_energy": base_energy, "effective_rank": math.nan}
        row |= {"effective_rank_ratio": math.nan, "stable_rank": math.nan}
        if own and own.values[0] > 0:
            rank, k = effective_rank(own.values), len(own.values)
            stable = own.retained(k) / own.retained(1)
            row |= {"effective_rank": rank, "effective_rank_ratio": rank / k, "stable_rank": stable}
            for ratio in self.curve:
                kept = own.retained(rank_for(ratio, (k, k)))
                self.rows["spectra"].append(place | {"rank_ratio": ratio, "kept": kept, "all": own.retained(k)})
        self.rows["experts"].append(row)

    def _pair(self, place: dict[str, Any], products: Products, i: int, j: int) -> None:
        sums = {field: float(value[i, j]) for field, value in products._asdict().items()}
        energies = {"first_energy": float(products.dot[i, i]), "second_energy": float(products.dot[j, j])}
        self.rows["pairs"].append(place | sums | energies | dict.fromkeys(_PREDICTIONS, 0.0))

    def _subspaces(
        self, place: dict[str, Any], matrices: Sequence[torch.Tensor], spectra: Sequence[Spectrum], i: int, j: int
    ) -> None:
        first, second = spectra[i], spectra[j]
        shape = (matrices[i].shape[0], matrices[i].shape[1])
        left = (first.left.T @ second.left).double().numpy()
        right = (first.right.T @ second.right).double().numpy()
        energies = [spectra[one].retained(len(spectra[one].values)) for one in (i, j)]
        for ratio in self.ratios:
            r, s = (min(rank_for(ratio, shape), count) for count in left.shape)
            row = place | {"rank_ratio": ratio, "weight": math.sqrt(energies[0] * energies[1])}
            for side, cross, size in (("left", left, shape[0]), ("right", right, shape[1])):
                cosines = principal_cosines(cross[:r, :s])
                angles = np.degrees(np.arccos(cosines))
                row |= {f"{side}_overlap": float(np.square(cosines).mean()), f"{side}_chance": max(r, s) / size}
                row |= {f"{side}_angle": float(np.median(angles)), f"{side}_smallest": float(angles[0])}
            values = first.values[:r], second.values[:s]
            row["shared"] = task_interference(left[:r, :s], right[:r, :s], *values)
            row["norms"] = float(sum(np.linalg.norm(one) for one in values))
            self.rows["subspaces"].append(row)
        last = self.rows["pairs"][-1]
        for one, other, energy, side in ((i, j, energies[0], "first"), (j, i, energies[1], "second")):
            own = spectra[one]
            seen = (own.left.T @ matrices[other] @ own.right).double().numpy()
            loss = predicted_loss(seen, own.values[: len(seen)], self.scaling)
            last |= {f"{side}_lost": loss * energy, f"{side}_matrices": energy}

    def finish(self, base: str) -> Diagnosis:
        return Diagnosis(
            base,
            self.scaling,
            self.ratios,
            self._table("experts", ("expert",), _expert_figures),
            self._table("spectra", ("expert", "rank_ratio"), _spectrum_figures),
            self._table("pairs", ("first", "second"), _pair_figures),
            self._table("subspaces", ("first", "second", "rank_ratio"), _subspace_figures),
        )

    def _table(self, kind: str, keys: tuple[str, ...], figures: Callable[[pd.DataFrame], pd.DataFrame]) -> pd.DataFrame:
        rows = pd.DataFrame(self.rows[kind])
        if rows.empty:
            return pd.DataFrame(columns=["level", "name", *keys, *_COLUMNS[kind]])
        means = [name for name in rows.columns if name in _MEANS]
        for name in means:
            weight = rows["energy" if kind == "experts" else "weight"]
            rows[f"{name}_weight"] = weight.where(rows[name].notna(), 0.0)
            rows[name] = (rows[name] * weight).fillna(0.0)
        tables = []
        for level in ("tensor", "layer", "part", "model"):
            places = [one for one in ("tensor", "layer", "part", "model") if one != level]
            sums = rows.drop(columns=places).groupby([level, *keys], sort=False).sum().reset_index()
            for name in means:
                sums[name] = _divide(sums[name], sums[f"{name}_weight"])
            sums.insert(0, "level", level)
            tables.append(figures(sums.rename(columns={level: "name"})))
        return pd.concat(tables, ignore_index=True)[["level", "name", *keys, *_COLUMNS[kind]]]


_PREDICTIONS = ("first_lost", "first_matrices", "second_lost", "second_matrices")
_SIDES = tuple(f"{side}_{what}" for side in ("left", "right") for what in ("overlap", "chance", "angle", "smallest"))
_MEANS = {"effective_rank", "effective_rank_ratio", "stable_rank", *_SIDES}
_COLUMNS: dict[str, tuple[str, ...]] = {
    "experts": (
        "energy",
        "norm",
        "relative_norm",
        "energy_share",
        "effective_rank",
        "effective_rank_ratio",
        "stable_rank",
    ),
    "spectra": ("retained_energy",),
    "pairs": Diagnosis.PAIR_FIGURES,
    "subspaces": (*_SIDES, "interference"),
}


def _expert_figures(sums: pd.DataFrame) -> pd.DataFrame:
    total = sums.groupby("expert").energy.transform("sum")
    return sums.assign(
        norm=np.sqrt(sums.energy),
        relative_norm=np.sqrt(_divide(sums.energy, sums.base_energy)),
        energy_share=_divide(sums.energy, total),
    )


def _spectrum_figures(sums: pd.DataFrame) -> pd.DataFrame:
    return sums.assign(retained_energy=_divide(sums.kept, sums["all"]))


def _pair_figures(sums: pd.DataFrame) -> pd.DataFrame:
    losses = [_divide(sums[f"{side}_lost"], sums[f"{side}_matrices"]) for side in ("first", "second")]
    return sums.assign(
        cosine=_divide(sums["dot"], np.sqrt(sums.first_energy) * np.sqrt(sums.second_energy)).clip(-1, 1),
        sign_conflict=_divide((sums.both - sums.sign) / 2, sums.both),
        # A product is |ab| minus twice |ab| where the signs differ, so the conflict needs no mask.
        weighted_sign_conflict=_divide((sums.absolute - sums["dot"]) / 2, sums.absolute).clip(0, 1),
        predicted_loss=sum(losses) / 2,
    )


def _subspace_figures(sums: pd.DataFrame) -> pd.DataFrame:
    return sums.assign(interference=_divide(sums.shared, sums.norms))


def _divide(numerator: pd.Series, denominator: pd.Series) -> pd.Series:
    return numerator / denominator.where(denominator > 0)


def _layer(name: str) -> str:
    """`encoder.layers.3`, `encoder.conv1`, `decoder.embed_tokens`: up to the number, or all but the last component."""
    name = name.removeprefix("model.")
    numbered = re.match(r"(.*?\.\d+)\.", name)
    return numbered[1] if numbered else name.rpartition(".")[0] or name


def _part(name: str, shape: tuple[int, ...]) -> str:
    return next((part for part in ("embeddings", "encoder", "decoder") if in_group(part, name, shape)), "other")


def _order(name: str, shape: tuple[int, ...]) -> tuple[int, bool, int, str]:
    """As a model computes: the part, then what precedes its layers, the layers by number, the final norm."""
    layer = _layer(name)
    number = re.search(r"\.(\d+)$", layer)
    return PARTS.index(_part(name, shape)), not number and "norm" in layer, int(number[1]) if number else -1, layer
