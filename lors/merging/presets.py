"""What other libraries mean by a method's name, as parameters of ours: `like`. Their defaults, too.

They were read in mergekit 0.1.5, peft 0.21.2 and FusionBench 0.2.33; tests/lors/merging/test_peft.py and
benchmarks/equal_peers.py compare the numbers. What cannot be had: mergekit and peft draw DARE's masks from torch's
global generator, so theirs differ from run to run; mergekit's trim leaves the choice among equal magnitudes to an
unstable sort; FusionBench gives an election of exactly 0 to the majority of the whole model, here it is positive.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["PRESETS"]

_TRIM = {"scope": "tensor", "count": "down", "rescale": "none", "density": 1.0}
_MERGEKIT = {"election": "weighted", "tie": "positive"}
_PEFT = {"election": "unweighted", "divisor": "count", "tie": "positive"}

PRESETS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "mergekit": {
        "breadcrumbs": {"density": 1.0, "gamma": 0.01, "count": "down", "scaling": 1.0},
        "dare_linear": {"density": 1.0, "rescale": "l1", "scaling": 1.0},
        "dare_ties": {"density": 1.0, "rescale": "l1", "divisor": "none", **_MERGEKIT, "scaling": 1.0},
        "linear": {},
        "model_stock": {"clamp": False},
        "slerp": {},
        "task_arithmetic": {"scaling": 1.0},
        "ties": {**_TRIM, "count": "down_to_one", "divisor": "weights", **_MERGEKIT, "scaling": 1.0},
    },
    "peft": {
        "dare_linear": {"density": 1.0, "rescale": "density", "scaling": 1.0},
        "dare_ties": {"density": 1.0, "rescale": "density", **_PEFT, "scaling": 1.0},
        "task_arithmetic": {"scaling": 1.0},
        "ties": {**_TRIM, **_PEFT, "scaling": 1.0},
    },
    "fusionbench": {
        "dare_linear": {"density": 0.5, "rescale": "density", "scaling": 0.3},
        "iso_c": {"scaling": 1.0},
        "iso_cts": {"common": 0.8, "scaling": 1.0},
        "magmax": {"scaling": 0.5},
        "slerp": {},
        "task_arithmetic": {"scaling": 0.3},
        "ties": {
            "density": 0.2,
            "scope": "model",
            "count": "threshold",
            "election": "unweighted",
            "divisor": "none",
            "tie": "positive",
            "scaling": 0.3,
        },
        "tsv_m": {"scaling": 1.0},
        "weight_average": {},
    },
}
"""By library and method: parameters, and under `scaling` the scaling coefficient."""
