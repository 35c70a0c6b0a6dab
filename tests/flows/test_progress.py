from __future__ import annotations

import pytest

from flows import progress
from flows.progress import RunProgress


def event(done: int, **more: object) -> dict[str, object]:
    return {"done": done, "total": 9, "unit": "steps", **more}


def test_lines_in_a_log(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_LINE_SECONDS", -1.0)
    with RunProgress(5, 3) as run:
        run("fine-tune es", event(1, loss=0.123456, samples_per_second=7.0))
        run("fine-tune es", {"message": "waiting"})
        run("prepare es", event(2, note="train") | {"total": None})
        run("fine-tune es", {"finished": True, "seconds": 4.26})
        run("prepare es", {"finished": True, "seconds": None})
    captured = capsys.readouterr()
    assert captured.out == ""
    assert [line[9:] for line in captured.err.splitlines()] == [
        "5 steps, 3 of them cached",
        "fine-tune es: 1/9 steps, loss 0.123, samples per second 7",
        "fine-tune es: waiting",
        "prepare es: 2 steps, train",
        "[1/2] fine-tune es: done in 4.3 s",
    ]


def test_no_more_lines_than_are_read(capsys: pytest.CaptureFixture[str]) -> None:
    with RunProgress(2, 0) as run:
        for done in range(9):
            run("fine-tune es", event(done))
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_bars_in_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "120")
    with RunProgress(2, 0) as run:
        run("fine-tune es", event(3, loss=0.5))
        assert run._progress is not None
        bars = {task.description: (task.completed, task.total) for task in run._progress.tasks}
        assert bars == {"all steps": (0, 2), "fine-tune es": (3, 9)}
        run("fine-tune es", {"finished": True, "seconds": 1.0})
        bars = {task.description: (task.completed, task.total) for task in run._progress.tasks}
        assert bars == {"all steps": (1, 2)}
    assert "[1/2] fine-tune es: done in 1.0 s" in capsys.readouterr().err


def test_what_was_known_to_be_cached_is_not_counted_again(capsys: pytest.CaptureFixture[str]) -> None:
    with RunProgress(4, 1, {"prepare es"}) as run:
        run("prepare es", {"finished": True, "seconds": None})
        run("fine-tune es", {"finished": True, "seconds": 1.0})
        run("extract es", {"finished": True, "seconds": None})
        run("prune es", {"finished": True, "seconds": 2.0})
    lines = [line[9:] for line in capsys.readouterr().err.splitlines()]
    assert lines == ["4 steps, 1 of them cached", "[1/3] fine-tune es: done in 1.0 s", "[3/3] prune es: done in 2.0 s"]
