from __future__ import annotations

import threading
import time

import pytest
import torch

from lors.workers import run_all, run_ordered, run_unordered


def test_run_all_keeps_the_order_the_size_and_the_first_error():
    running, most, lock = 0, 0, threading.Lock()
    sizes = {"a": 1, "b": 5, "c": 5, "d": 5, "e": 2}

    def work(name: str) -> str:
        nonlocal running, most
        with lock:
            running += sizes[name]
            most = max(most, running)
        time.sleep(0.01)
        with lock:
            running -= sizes[name]
        return name.upper()

    assert run_all(work, [*sizes], 4, sizes.__getitem__) == ["A", "B", "C", "D", "E"]
    assert 5 < most <= 10  # twice the largest
    assert [*run_ordered(work, "edcba", 2, sizes.__getitem__)] == [(n, n.upper()) for n in "edcba"]
    assert sorted(run_unordered(work, "edcba", 2, sizes.__getitem__)) == [(n, n.upper()) for n in "abcde"]
    started: list[str] = []

    def fail(name: str) -> None:
        started.append(name)
        raise ValueError(name)

    with pytest.raises(ValueError, match="a"):
        run_all(fail, [f"a{n}" for n in range(100)], 1)
    assert len(started) < 100
    with pytest.raises(ValueError, match="a"):
        list(run_unordered(fail, [f"a{n}" for n in range(100)], 1))
    assert len(started) < 100


def test_threads_are_as_many_as_before_in_the_end():
    before = torch.get_num_threads()
    assert run_all(lambda name: torch.get_num_threads(), ["a", "b"], 2) == [1, 1]
    assert torch.get_num_threads() == before
    for _ in run_unordered(lambda name: name, "abc", 2):
        break
    assert run_all(str, [], 2) == []
