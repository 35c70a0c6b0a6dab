"""TensorBoard's curves."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
from training_jobs import examples, settings, tiny_model

from lors.errors import InputError
from lors.training.curves import tensorboard_writer
from lors.training.finetune import fine_tune


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="the extra tensorboard is not installed")
def test_curves_of_a_training(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    own = settings(steps=4, validation={"every": 2, "metric": "loss"})
    events: list[Any] = []
    with tensorboard_writer(tmp_path / "curves") as draw:

        def tell(event: Any) -> None:
            events.append(event)
            draw(event)

        draw({"message": "not a number"})
        fine_tune(tiny_model(), examples(), examples(3), own, tmp_path / "work", tell)
    read = EventAccumulator(str(tmp_path / "curves"))
    read.Reload()
    assert {"loss", "learning_rate", "samples_per_second", "validation_loss"} <= set(read.Tags()["scalars"])
    for name, steps in (("loss", [1, 2, 3, 4]), ("validation_loss", [2, 4])):
        found = read.Scalars(name)
        assert [point.step for point in found] == steps
        assert [point.value for point in found] == pytest.approx([e[name] for e in events if name in e], rel=1e-6)


def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(InputError, match=r"pip install 'lors\[tensorboard\]'"), tensorboard_writer(tmp_path):
        pass
