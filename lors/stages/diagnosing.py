"""How the experts differ from the base and from one another."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lors.files import write_json
from lors.stages.common import VECTOR, Report, use

__all__ = ["diagnose_experts"]


def diagnose_experts(
    inputs: Mapping[str, str], places: Mapping[str, Any], out: str, threads: int, report: Report, **_: Any
) -> dict[str, Any]:
    """The spectra of the experts' task vectors and their interference (`lors.diagnostics`)."""
    from lors.checkpoint import Checkpoint
    from lors.delta_file import DeltaFile
    from lors.diagnostics import diagnose

    use(threads)
    vectors = {expert: DeltaFile(Path(folder) / VECTOR) for expert, folder in inputs.items()}
    diagnosis = diagnose(
        Checkpoint(places["base"]),
        vectors,
        on_progress=lambda done, total: report({"done": done, "total": total, "unit": "parameters"}),
    )
    write_json(Path(out) / "diagnosis.json", diagnosis.to_json())
    return {"experts": len(vectors)}
