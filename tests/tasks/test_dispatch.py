"""Runs of a deployment without a worker: the test gives them the states that a worker would."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from uuid import UUID

import httpx
import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentCreate
from prefect.states import Cancelling, Completed, Crashed, Failed, Pending, Running, State

from lors.errors import ConfigError, InputError, StepFailedError
from tasks import dispatch
from tasks.dispatch import Order, cancel, require_deployments, train_on_worker

ORDER = Order("trial/trial", {}, "train es-transcribe", ("lors", "language:es"))


@flow(name="trial")
def trial() -> None:
    pass


@pytest.fixture(scope="module")
def client(prefect_api: str) -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as made:
        flow_id = made.create_flow_from_name("trial")
        body = DeploymentCreate(name="trial", flow_id=flow_id).model_dump(mode="json", exclude_unset=True)
        made.request("POST", "/deployments/", json=body)
        yield made


@pytest.fixture
def key() -> str:
    """Another step for every test."""
    return uuid.uuid4().hex


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "POLL_SECONDS", 0.05)


class Wait:
    """A wait in a thread of its own."""

    def __init__(self, key: str, order: Order = ORDER) -> None:
        self.started: list[UUID] = []
        self.told: list[Mapping[str, Any]] = []
        self.error: BaseException | None = None
        self.stopping = threading.Event()
        self._has_started = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(order, key))
        self._thread.start()

    def _work(self, order: Order, key: str) -> None:
        def started(run: UUID) -> None:
            self.started.append(run)
            self._has_started.set()

        try:
            train_on_worker(order, key, self.told.append, started, self.stopping.is_set)
        except BaseException as error:
            self.error = error

    def run(self) -> UUID:
        assert self._has_started.wait(30), self.error
        return self.started[0]

    def end(self) -> BaseException | None:
        self._thread.join(30)
        assert not self._thread.is_alive()
        return self.error


def put(client: SyncPrefectClient, run: UUID, state: State[Any]) -> None:
    client.set_flow_run_state(run, state, force=True)


def test_it_waits_until_the_run_is_done(client: SyncPrefectClient, key: str) -> None:
    wait = Wait(key)
    run = client.read_flow_run(wait.run())
    assert run.name == "train es-transcribe"
    assert set(run.tags) >= {"lors", "language:es", f"key:{key}"}
    put(client, run.id, Running())
    put(client, run.id, Completed())
    assert wait.end() is None
    assert any("waiting for a worker" in event.get("message", "") for event in wait.told)


def test_two_who_ask_at_once_wait_for_one_run(client: SyncPrefectClient, key: str) -> None:
    waits = [Wait(key) for _ in range(4)]
    runs = {wait.run() for wait in waits}
    assert len(runs) == 1
    put(client, runs.pop(), Completed())
    assert [wait.end() for wait in waits] == [None] * 4


def test_a_run_under_way_is_found_again_and_an_ended_one_is_not_asked_twice(
    client: SyncPrefectClient, key: str
) -> None:
    first = Wait(key)
    run = first.run()
    put(client, run, Running())
    first.stopping.set()  # as a killed command leaves it
    assert "was not waited for" in str(first.end())
    second = Wait(key)
    assert second.run() == run
    put(client, run, Crashed(message="the machine is gone"))
    error = second.end()
    assert isinstance(error, StepFailedError)
    assert "ended as Crashed: the machine is gone" in str(error)
    third = Wait(key)
    assert third.run() != run
    put(client, third.run(), Completed())
    assert third.end() is None


def test_the_worker_s_own_error_comes_back(client: SyncPrefectClient, key: str) -> None:
    wait = Wait(key)
    message = "Flow run encountered an exception: ConfigError: base: no such folder: give another"
    put(client, wait.run(), Failed(message=message))
    error = wait.end()
    assert type(error) is ConfigError
    assert str(error) == "base: no such folder: give another"


@pytest.mark.parametrize("message", ["Flow run encountered an exception: RuntimeError: it broke", None])
def test_any_other_failure_may_pass(message: str | None, client: SyncPrefectClient, key: str) -> None:
    wait = Wait(key)
    put(client, wait.run(), Failed(message=message))
    error = wait.end()
    assert type(error) is StepFailedError


def test_a_server_that_is_away_for_a_while_is_waited_for(
    client: SyncPrefectClient, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait = Wait(key)
    run = wait.run()
    _away(monkeypatch, 5)
    put(client, run, Completed())
    assert wait.end() is None


def test_a_server_that_stays_away_ends_the_wait(
    client: SyncPrefectClient, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "AWAY_SECONDS", 0.3)
    wait = Wait(key)
    wait.run()
    _away(monkeypatch, 10**6)
    error = wait.end()
    assert isinstance(error, StepFailedError)
    assert "did not answer for 0.3 s" in str(error)
    assert any("does not answer" in event.get("message", "") for event in wait.told)


def _away(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    real: Callable[..., Any] = SyncPrefectClient.read_flow_run
    left = [times]

    def read(self: SyncPrefectClient, run: UUID) -> Any:
        left[0] -= 1
        if left[0] >= 0:
            raise httpx.ConnectError("refused")
        return real(self, run)

    monkeypatch.setattr(SyncPrefectClient, "read_flow_run", read)


def test_a_run_that_was_lost_with_its_worker_crashes(
    client: SyncPrefectClient, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "PENDING_SECONDS", 0.5)
    wait = Wait(key)
    run = wait.run()
    put(client, run, Pending())
    assert isinstance(wait.end(), StepFailedError)
    state = client.read_flow_run(run).state
    assert state is not None
    assert state.is_crashed()


def test_a_run_that_nobody_waits_for_is_cancelled(client: SyncPrefectClient, key: str) -> None:
    wait = Wait(key)
    run = wait.run()
    put(client, run, Running())
    wait.stopping.set()
    wait.end()
    cancel({run})
    state = client.read_flow_run(run).state
    assert state is not None
    assert state.type == Cancelling().type


def test_a_missing_deployment_is_a_sentence(client: SyncPrefectClient) -> None:
    require_deployments({"trial/trial"})
    with pytest.raises(InputError, match="has no deployment trial/other: make it with `lors up`"):
        require_deployments({"trial/other", "trial/trial"})
