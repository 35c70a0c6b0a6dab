"""SIGTERM as a question."""

from __future__ import annotations

import os
import signal
import threading

from lors.training.signals import stop_on_sigterm


def test_sigterm_is_an_answer_inside_and_itself_after() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_sigterm() as stop:
        assert not stop()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop()
    assert signal.getsignal(signal.SIGTERM) == before
    with stop_on_sigterm() as again:
        assert not again()


def test_another_thread_is_never_asked_to_stop() -> None:
    answers: list[bool] = []

    def work() -> None:
        with stop_on_sigterm() as stop:
            answers.append(stop())

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert answers == [False]
    assert signal.getsignal(signal.SIGTERM) == before
