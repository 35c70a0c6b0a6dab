"""The functions that do what the settings in `recipe` say."""

from __future__ import annotations

from lors.merging import elementwise, geometry, spectral
from lors.merging import recipe as r
from lors.merging.combiners import Fold, Joint

__all__ = ["combiner"]


def combiner(settings: r.Combine) -> Fold | Joint:
    """The combiner of these settings."""
    match settings:
        case r.Sum():
            return elementwise.weighted_sum()
        case r.Linear():
            return elementwise.linear(settings.normalize)
        case r.Ties():
            return elementwise.ties(settings.election, settings.divisor, settings.tie)
        case r.MagMax():
            return elementwise.magmax()
        case r.Consensus():
            return elementwise.consensus(settings.threshold, settings.agreement)
        case r.Slerp():
            return geometry.slerp(settings.t, settings.space)
        case r.ModelStock():
            return geometry.model_stock(settings.clamp)
        case r.TsvM():
            return spectral.tsv_m(settings.rank_ratio)
        case r.IsoC():
            return spectral.iso_c()
        case r.IsoCts():
            return spectral.iso_cts(settings.common)
        case r.Knots():
            return spectral.knots(settings.density, settings.election, settings.divisor)
