"""The algebra of merging as data: prune steps, then a combiner, then the scaling coefficient. No torch here.

    merged = base + lambda * combine(steps(delta_1), ..., steps(delta_N))

The settings of each step and combiner are one frozen model, whose fields `lors merge --list` prints.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from lors.groups import overrides
from lors.prune_settings import PruneSettings

__all__ = [
    "Breadcrumbs",
    "Combine",
    "Consensus",
    "Group",
    "IsoC",
    "IsoCts",
    "Knots",
    "Linear",
    "Lors",
    "MagMax",
    "Magnitude",
    "ModelStock",
    "Random",
    "Recipe",
    "Slerp",
    "Star",
    "Step",
    "Sum",
    "Ties",
    "TsvM",
    "with_group",
]

Density = Annotated[float, Field(gt=0, le=1)]
Share = Annotated[float, Field(ge=0, le=1)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class Lors(PruneSettings):
    """LoRS pruning: a low-rank plus a sparse part (arXiv 2502.17380)."""

    kind: Literal["lors"] = "lors"
    """This step."""


class Magnitude(_Part):
    """Keep the entries of largest magnitude; among equal ones the first (TIES-Merging, arXiv 2306.01708, sec. 4)."""

    kind: Literal["magnitude"] = "magnitude"
    """This step."""
    density: Density = 0.2
    """Fraction of the entries kept."""
    scope: Literal["tensor", "model"] = "model"
    """Whether the fraction is of each tensor or of the whole task vector (the paper's)."""
    rescale: Literal["none", "density", "l1"] = "none"
    """What is kept is multiplied by nothing, 1 / density, or so that the tensor keeps its sum of magnitudes."""
    count: Literal["nearest", "down", "down_to_one", "threshold"] = "nearest"
    """How many are kept: density * size rounded, or cut to an integer, or that but never 0; or that integer + 1 and all
    that equal the last (the published code of TIES)."""


class Random(_Part):
    """Keep random entries and rescale them (DARE, arXiv 2311.03099, sec. 3). The same for the same seed and expert."""

    kind: Literal["random"] = "random"
    """This step."""
    density: Density = 0.1
    """Probability that an entry is kept."""
    rescale: Literal["none", "density", "l1"] = "density"
    """As for magnitude; 1 / density is the paper's."""
    seed: Annotated[int, Field(ge=0)] = 0
    """With the expert's id and the tensor's name it decides what is kept."""


class Breadcrumbs(_Part):
    """Drop the largest and the smallest magnitudes of each tensor; the defaults are, in its terms, beta = 85 %,
    gamma = 99.3 % (Model Breadcrumbs, arXiv 2312.06795, sec. 3)."""

    kind: Literal["breadcrumbs"] = "breadcrumbs"
    """This step."""
    density: Density = 0.143
    """Fraction of the entries kept; with gamma at most 1."""
    gamma: Annotated[float, Field(ge=0, lt=1)] = 0.007
    """Fraction of the entries dropped as too large (the paper's is 1 - this)."""
    rescale: Literal["none", "density", "l1"] = "none"
    """As for magnitude."""
    count: Literal["nearest", "down"] = "nearest"
    """As for magnitude, of both fractions."""


class Star(_Part):
    """Keep the largest singular values and rescale them to the whole nuclear norm (STAR, arXiv 2502.10339, sec. 3).
    Convolutions are seen as (out, in * k); vectors are kept as they are. The paper then takes the mean (linear)."""

    kind: Literal["star"] = "star"
    """This step."""
    eta: Annotated[float, Field(gt=0, le=1)] = 0.4
    """The fewest singular values are kept whose sum is at least this share of the sum of all."""


class Sum(_Part):
    """sum_i(w_i * delta_i)."""

    kind: Literal["sum"] = "sum"
    """This combiner."""


class Linear(_Part):
    """sum_i(w_i * model_i), over sum_i(w_i) where normalised (Model soups, arXiv 2203.05482, sec. 2)."""

    kind: Literal["linear"] = "linear"
    """This combiner."""
    normalize: bool = True
    """Divide by the sum of the merge weights."""


class Slerp(_Part):
    """Spherical interpolation between two experts, tensor by tensor (Shoemake 1985); the straight line where they are
    nearly parallel, cosine above 0.9995, as models of one base nearly always are. Takes no merge weights."""

    kind: Literal["slerp"] = "slerp"
    """This combiner."""
    t: Share = 0.5
    """0 is the first expert by id, 1 the second."""
    space: Literal["models", "deltas"] = "models"
    """Whether the arc is between the experts' weights or between their deltas."""


class Ties(_Part):
    """Elect a sign an entry, average what agrees with it (TIES-Merging, arXiv 2306.01708, sec. 4). The paper has no
    merge weights; with weights of 1 the elections by sum are one, and so are both means."""

    kind: Literal["ties"] = "ties"
    """This combiner."""
    election: Literal["unweighted", "weighted", "count"] = "weighted"
    """The sign of the sum of the deltas, of the weighted deltas, or of the most experts, whatever their weights.
    Weighted, a negative weight turns an expert's sign; otherwise an expert agrees by the sign of its delta."""
    divisor: Literal["count", "weights", "none"] = "weights"
    """What the weighted sum of those that agree is divided by: how many they are, their weights, or 1."""
    tie: Literal["drop", "positive", "negative"] = "drop"
    """What the election of exactly 0 gives: nothing (the paper's formula), or the mean of one side. The published code
    takes the sign that most entries of the whole model have."""


class MagMax(_Part):
    """The weighted entry of largest magnitude among the experts, of two equal ones the positive (MagMax,
    arXiv 2407.06322, sec. 4)."""

    kind: Literal["magmax"] = "magmax"
    """This combiner."""


class ModelStock(_Part):
    """The mean, drawn to the base by the angle between the deltas, tensor by tensor (Model Stock, arXiv 2403.19522,
    sec. 4); the base where the deltas' mean cosine is below 0. Takes no merge weights."""

    kind: Literal["model_stock"] = "model_stock"
    """This combiner."""
    clamp: bool = True
    """Stay at the base where the mean cosine is below 0, and do not move away from the experts as the formula would."""


class Consensus(_Part):
    """The weighted sum where the TALL masks of enough experts agree (Consensus Merging, arXiv 2405.07813, sec. 4)."""

    kind: Literal["consensus"] = "consensus"
    """This combiner."""
    threshold: Annotated[float, Field(gt=0)] = 0.4
    """The TALL mask's lambda: an entry is an expert's where |delta| >= threshold * |sum - delta|, the deltas weighted.
    The paper chooses it per expert from 0.2 to 0.6 on validation data."""
    agreement: Annotated[int, Field(ge=1)] = 2
    """How many masks must hold an entry (all, where there are fewer experts): 1 drops the entries that no expert needs,
    2, the paper's, those that only one does as well."""


class TsvM(_Part):
    """Each expert's first singular directions, orthogonalised against one another (TSV-M, arXiv 2412.00081, sec. 4).
    Vectors and convolutions become the mean of the weighted deltas, as in the published code."""

    kind: Literal["tsv_m"] = "tsv_m"
    """This combiner."""
    rank_ratio: Annotated[float, Field(gt=0, le=1)] | None = None
    """Rank over the short side, of each expert; where not given the rank is the short side // the number of experts,
    at least 1 (the paper's)."""


class IsoC(_Part):
    """The weighted sum with its singular values all made their mean (Iso-C, arXiv 2502.04959, sec. 4.1). Vectors and
    convolutions become the mean of the weighted deltas, as in the published code."""

    kind: Literal["iso_c"] = "iso_c"
    """This combiner."""


class IsoCts(_Part):
    """Iso-C of a common and of task-specific subspaces (Iso-CTS, arXiv 2502.04959, sec. 4.2). Vectors and convolutions
    become the mean of the weighted deltas, as in the published code."""

    kind: Literal["iso_cts"] = "iso_cts"
    """This combiner."""
    common: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Share of the directions that the common subspace takes, and what is left when the experts have shared the rest
    out equally; 0.8 is the paper's, 1 is Iso-C."""


class Knots(_Part):
    """TIES in the space that the experts' SVD shares (KnOTS, arXiv 2410.19735, sec. 4). Convolutions are seen as
    (out, in * k); vectors are merged by TIES as they are."""

    kind: Literal["knots"] = "knots"
    """This combiner."""
    density: Density = 0.2
    """Fraction kept of each expert's right factor S Vh_i, by magnitude, of each tensor, before the signs are elected.
    0.2 is the published setting for vision, 1 for language models; there it is of the whole model."""
    election: Literal["unweighted", "weighted", "count"] = "weighted"
    """As in ties."""
    divisor: Literal["count", "weights", "none"] = "weights"
    """As in ties."""


Step = Annotated[Lors | Magnitude | Random | Breadcrumbs | Star, Field(discriminator="kind")]
Combine = Annotated[
    Sum | Linear | Slerp | Ties | MagMax | ModelStock | Consensus | TsvM | IsoC | IsoCts | Knots,
    Field(discriminator="kind"),
]


class Group(_Part):
    """What is set otherwise for a named group of parameters or a glob pattern over their names."""

    scaling: float | None = None
    """The scaling coefficient."""
    rank_ratio: Annotated[float, Field(gt=0, le=1)] | None = None
    """Of every step and combiner that has one."""
    density: Density | None = None
    """Of every step and combiner that has one."""
    exclude: bool | None = None
    """Leave these parameters as they are in the base; false takes them out of an earlier group that does."""


class Recipe(_Part):
    """One way to merge, complete."""

    method: str = "custom"
    """The method that it is a setting of."""
    steps: tuple[Step, ...] = ()
    """What each expert's deltas go through, in this order."""
    combine: Combine = Sum()
    """How they become one."""
    scaling: float = 1.0
    """The scaling coefficient lambda."""
    groups: dict[str, Group] = {}
    """Other settings for groups of parameters; a later group wins."""

    @property
    def pruning(self) -> PruneSettings | None:
        """What the first LoRS step keeps, with the groups' ranks and densities put in; None where there is none."""
        for step in self.steps:
            if isinstance(step, Lors):
                own = {name: group.model_dump(include={"rank_ratio", "density"}) for name, group in self.groups.items()}
                groups = {name: values for name, values in own.items() if any(values.values())}
                settings = step.model_dump(exclude={"kind"})
                return PruneSettings.model_validate({**settings, "groups": {**settings.get("groups", {}), **groups}})
        return None

    def group(self, name: str, shape: tuple[int, ...]) -> Group:
        """What is set otherwise for one parameter."""
        if not self.groups:
            return Group()
        settings = {group: own.model_dump(exclude_none=True) for group, own in self.groups.items()}
        return Group(**overrides(settings, name, shape))

    def scaling_of(self, name: str, shape: tuple[int, ...], scaling: float | None = None) -> float:
        """The scaling coefficient of one parameter; `scaling`, where given, in place of the recipe's own."""
        own = self.group(name, shape)
        if own.exclude:
            return 0.0
        return own.scaling if own.scaling is not None else self.scaling if scaling is None else scaling


def with_group(part: Any, group: Group) -> Any:
    """A step's or a combiner's settings with a group's put in."""
    changes = group.model_dump(include={"rank_ratio", "density"} & type(part).model_fields.keys(), exclude_none=True)
    return part.model_copy(update=changes) if changes else part
