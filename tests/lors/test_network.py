"""What may be tried again of a client's errors."""

from __future__ import annotations

import socket

import pytest
from huggingface_hub import constants
from huggingface_hub import errors as hub_errors

from lors import network
from lors.errors import CheckpointError, UnreachableError
from lors.model_folder import resolve_folder
from lors.network import can_pass, patiently


@pytest.fixture(autouse=True)
def _online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(network, "_DELAYS", (0.0, 0.0))


def answered(status: int) -> Exception:
    client = __import__(hub_errors.Response.__module__)  # that this release of the library uses
    response = client.Response(status, request=client.Request("GET", "https://x/y"))
    return hub_errors.HfHubHTTPError("a line", response=response)


def refused() -> Exception:
    client = __import__(hub_errors.Response.__module__)
    error: Exception = client.ConnectError("refused")
    return error


def caused(cause: Exception) -> Exception:
    error = hub_errors.LocalEntryNotFoundError("not in the cache")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (answered(503), True),
        (answered(429), True),
        (answered(404), False),
        (answered(403), False),
        (refused(), True),
        (caused(refused()), True),
        (caused(answered(404)), False),
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (OSError(28, "No space left on device"), False),
        (ValueError("odd"), False),
    ],
)
def test_a_busy_or_silent_server_can_pass_and_a_refusal_cannot(
    error: Exception, passes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert can_pass(error) is passes
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not can_pass(error)  # who asked for no network gets none later either


@pytest.mark.parametrize("failures", [0, 1, 2, 3])
def test_three_tries(failures: int) -> None:
    tries = []

    def call() -> str:
        tries.append(1)
        if len(tries) <= failures:
            raise refused()
        return "done"

    if failures < 3:
        assert patiently(call) == "done"
    else:
        with pytest.raises(type(refused())):
            patiently(call)
    assert len(tries) == min(failures + 1, 3)


def test_what_cannot_pass_is_raised_at_once() -> None:
    tries = []

    def call() -> None:
        tries.append(1)
        raise answered(404)

    with pytest.raises(hub_errors.HfHubHTTPError):
        patiently(call)
    assert tries == [1]


def test_a_base_of_a_hub_that_is_away_may_be_had_later(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    with pytest.raises(UnreachableError, match=r"did not give the model who/model .*: check the network"):
        resolve_folder("who/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="who/model is neither a folder nor"):
        resolve_folder("who/model")
