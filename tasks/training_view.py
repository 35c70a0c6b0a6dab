"""A training in the Prefect UI: a progress artifact and the curve of its loss, both alive while it runs."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import get_run_logger
from prefect.artifacts import create_image_artifact, create_progress_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactUpdate

from lors.plots import as_data_uri, line_chart

__all__ = ["TrainingView"]

_SECONDS = 10.0


class TrainingView:
    """Takes the events of one training; writes to Prefect's API at most every ten seconds."""

    def __init__(self, step: str) -> None:
        """`step` is the step's name."""
        self._step, self._key = step, re.sub(r"[^a-z0-9]+", "-", step.lower())
        self._points: dict[str, list[tuple[float, float]]] = {}
        self._artifacts: tuple[UUID, UUID] | None = None
        self._told = 0.0

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Take an event of `lors.training.finetune.fine_tune`; others are ignored."""
        if event.get("unit") != "steps":
            return
        self._add(event["done"], event)
        if time.monotonic() - self._told >= _SECONDS:
            self._try_to_show(100 * event["done"] / event["total"])
            self._told = time.monotonic()

    def finish(self, log: Path) -> None:
        """Show the whole training from its log, the steps before a resume included."""
        self._points = {}
        for line in log.read_text("utf-8").splitlines():
            entry = json.loads(line)
            self._add(entry["step"], entry)
        self._try_to_show(100.0)

    def _add(self, step: int, entry: Mapping[str, Any]) -> None:
        for name, value in entry.items():
            if name == "loss" or (name.startswith("validation_") and isinstance(value, int | float)):
                self._points.setdefault(name.replace("_", " "), []).append((step, float(value)))

    def _try_to_show(self, percent: float) -> None:
        try:
            self._show(percent)
        except Exception as error:  # an API that is away for a moment must not end hours of training
            get_run_logger().warning("the progress of %s could not be shown: %s", self._step, error)

    def _show(self, percent: float) -> None:
        picture = as_data_uri(line_chart(self._points, "step"))
        if self._artifacts is None:
            key, name = self._key, self._step
            told = create_progress_artifact(percent, key=f"{key}-progress", description=f"Progress of {name}")
            drawn = create_image_artifact(picture, key=f"{key}-loss", description=f"Loss of {name}")
            assert isinstance(told, UUID)
            assert isinstance(drawn, UUID)
            self._artifacts = told, drawn
            return
        with get_client(sync_client=True) as client:
            for artifact, data in zip(self._artifacts, (percent, picture), strict=True):
                client.update_artifact(artifact, ArtifactUpdate(data=data))
