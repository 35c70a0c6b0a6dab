"""A training in the Prefect UI: a progress artifact and the curve of its loss, both alive while it runs."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import get_run_logger
from prefect.artifacts import create_markdown_artifact, create_progress_artifact
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
        self._artifacts: dict[str, UUID] = {}
        self._told = 0.0

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Take an event of `lors.training.finetune.fine_tune`, or a worker's share in percent; others are ignored."""
        if event.get("unit") not in ("steps", "%"):
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
        self._put("progress", create_progress_artifact, percent)
        if self._points:
            step = max(points[-1][0] for points in self._points.values())
            last = ", ".join(f"{name} {points[-1][1]:.4g}" for name, points in self._points.items())
            picture = as_data_uri(line_chart(self._points, "step"))
            # Markdown: the UI prints the whole address of an image artifact, here kilobytes, across the page.
            self._put("loss", create_markdown_artifact, f"{percent:.0f} %, step {step}: {last}\n\n![Loss]({picture})\n")

    def _put(self, kind: str, create: Callable[..., Any], data: float | str) -> None:
        if kind in self._artifacts:
            with get_client(sync_client=True) as client:
                client.update_artifact(self._artifacts[kind], ArtifactUpdate(data=data))
        else:
            made = create(data, key=f"{self._key}-{kind}", description=f"{kind.capitalize()} of {self._step}")
            assert isinstance(made, UUID)
            self._artifacts[kind] = made
