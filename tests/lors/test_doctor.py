"""The checks name what is wrong and what to do, and one that breaks does not end the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from lors import doctor
from lors.doctor import Check, examine

EXPERIMENT = "base: {base}\nlanguages: [es]\ncorpora: {{source: synthetic}}\noutput: {output}\nstore: {output}\n"


def found(name: str, checks: list[Check]) -> Check:
    return next(check for check in checks if check.name == name)


def test_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    checks = examine()
    assert {"devices", "prefect", "prefect api", "audio", "synthesis", "disk", "base"} <= {c.name for c in checks}
    assert found("audio", checks).ok
    assert found("synthesis", checks).ok
    assert not found("prefect api", checks).ok
    assert "prefect server start" in found("prefect api", checks).next
    assert all(check.next for check in checks if not check.ok)


def test_experiment(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "experiment.yaml"
    path.write_text(EXPERIMENT.format(base=tmp_path / "nowhere", output=tmp_path / "file"))
    checks = examine(path)
    assert found("experiment", checks).ok
    assert not found("base", checks).ok
    assert str(tmp_path / "nowhere") in found("base", checks).found
    assert "not writable" in found("disk", checks).found
    path.write_text("bas: starter\n")
    assert "unknown key 'bas', did you mean 'base'?" in found("experiment", examine(path)).found


def test_a_check_that_breaks_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "cores", lambda: 1 / 0)
    monkeypatch.setattr(doctor, "devices", list)
    checks = examine()
    assert found("devices", checks) == Check("devices", False, "ZeroDivisionError: division by zero", "see the message")
    assert found("audio", checks).ok
