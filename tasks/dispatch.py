"""A training done by a worker: one run of a deployment for each model, whoever asks for it, and the wait for it."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.states import Cancelling, Crashed

from lors import errors
from lors.errors import InputError, LorsError, StepFailedError

__all__ = ["Order", "cancel", "require_deployments", "train_on_worker"]

POLL_SECONDS = 2.0
_TELL_SECONDS = 10.0
AWAY_SECONDS = 900.0
"""How long the API may be away, for a new version of the server, say, before a wait for a worker ends."""
PENDING_SECONDS = float(os.environ.get("LORS_PENDING_SECONDS", "180"))
"""A run that a worker took and that did not begin within that time was lost with the worker."""
_SAID = re.compile(r"(?:encountered an exception|exception): (?P<kind>\w+): (?P<message>.*)", re.S)


@dataclass(frozen=True, slots=True)
class Order:
    """What a worker is asked to train."""

    deployment: str
    """`flow/deployment`."""
    parameters: Mapping[str, Any]
    """JSON values."""
    name: str
    """Of the worker's run."""
    tags: tuple[str, ...] = ()


def require_deployments(names: set[str]) -> None:
    """Raises InputError where the server lacks a deployment that trainings are sent to."""
    with get_client(sync_client=True) as client:
        for name in sorted(names):
            try:
                client.read_deployment_by_name(name)
            except ObjectNotFound:
                raise InputError(
                    f"the Prefect server {client.api_url} has no deployment {name}: make it with `lors up`, or with "
                    "`prefect deploy --all --prefect-file deployments/prefect.yaml`"
                ) from None


def train_on_worker(
    order: Order,
    key: str,  # the step's; no two runs that are under way have the same
    tell: Callable[[Mapping[str, Any]], None],
    started: Callable[[UUID], None],  # called with the run that is waited for
    stopping: Callable[[], bool],
) -> None:
    """Have a worker train a model and wait until it is done.

    A run for the same key that is under way already, of another command or of this one before it was killed, is waited
    for instead. Raises the worker's InputError, or StepFailedError where trying again may help: the run crashed or was
    cancelled.
    """
    tag, waiting, pending = f"key:{key}", _Waiting(tell), time.monotonic()
    with get_client(sync_client=True) as client:
        run = _run_for(client, order, tag)
        started(run.id)
        while True:
            with waiting.api():
                run = client.read_flow_run(run.id)
                if run.state is not None and run.state.is_final():
                    return _end(run)
                if run.state is None or not run.state.is_pending():
                    pending = time.monotonic()
                if time.monotonic() - pending > PENDING_SECONDS:
                    lost = Crashed(message=f"It did not begin within {PENDING_SECONDS:g} s of a worker taking it.")
                    client.set_flow_run_state(run.id, lost, force=True)
                waiting.show(client, run)
            if stopping():
                raise StepFailedError(f"{run.name} was not waited for, because the run is ending")
            time.sleep(POLL_SECONDS)


def _run_for(client: SyncPrefectClient, order: Order, tag: str) -> FlowRun:
    """The run for a key that is under way, or a new one.

    The server makes one run of an idempotency key. The number of ended runs is in it, so two who ask at once, or a
    request that is sent again because its answer was lost, get the same run.
    """
    query = {"flow_runs": {"tags": {"all_": [tag]}}, "sort": "EXPECTED_START_TIME_DESC", "limit": 200}
    known = [FlowRun.model_validate(run) for run in client.request("POST", "/flow_runs/filter", json=query).json()]
    for run in known:
        if run.state is not None and not run.state.is_final():
            return run
    made: Any = run_deployment(
        order.deployment,
        parameters=dict(order.parameters),
        flow_run_name=order.name,
        tags=[*order.tags, tag],
        idempotency_key=f"{tag}:{len(known)}",
        timeout=0,
    )
    assert isinstance(made, FlowRun)
    return made


def _end(run: FlowRun) -> None:
    state = run.state
    assert state is not None
    if state.is_completed():
        return
    said = _SAID.search(state.message or "")
    kind = getattr(errors, said["kind"], None) if said else None
    if said and isinstance(kind, type) and issubclass(kind, LorsError):
        raise kind(said["message"].strip())
    raise StepFailedError(f"the worker's run {run.name} ended as {state.name}: {state.message or 'no message'}")


class _Waiting:
    """What is shown while a worker's run is waited for, and how long the API may be away meanwhile."""

    def __init__(self, tell: Callable[[Mapping[str, Any]], None]) -> None:
        self._tell, self._told, self._said = tell, 0.0, ""
        self._away_since: float | None = None

    @contextmanager
    def api(self) -> Iterator[None]:
        try:
            yield
            self._away_since = None
        except (httpx.HTTPError, PrefectHTTPStatusError) as error:
            if isinstance(error, ObjectNotFound):
                raise StepFailedError("the worker's run was deleted from the server") from error
            now = time.monotonic()
            if self._away_since is None:
                self._away_since = now
                self._tell({"message": f"the Prefect API does not answer ({error}); still waiting for the worker"})
            if now - self._away_since > AWAY_SECONDS:
                raise StepFailedError(f"the Prefect API did not answer for {AWAY_SECONDS:g} s: {error}") from error

    def show(self, client: SyncPrefectClient, run: FlowRun) -> None:
        if time.monotonic() - self._told < _TELL_SECONDS:
            return
        self._told = time.monotonic()
        state = run.state
        assert state is not None
        if not state.is_running():
            said = f"{run.name} is {state.name.lower()}: waiting for a worker of the pool {run.work_pool_name}"
            if said != self._said:
                self._said = said
                self._tell({"message": said})
            return
        ours = {"flow_run_id": {"any_": [str(run.id)]}, "type": {"any_": ["progress"]}}
        found = client.request("POST", "/artifacts/filter", json={"artifacts": ours, "limit": 1}).json()
        if found and isinstance(found[0].get("data"), int | float):
            self._tell({"done": round(found[0]["data"]), "total": 100, "unit": "%", "note": "on a worker"})


def cancel(runs: set[UUID]) -> None:
    """Have the workers end runs that nobody waits for any more; each writes its checkpoint first."""
    with get_client(sync_client=True) as client:
        for run in runs:
            try:
                state = client.read_flow_run(run).state
                if state is not None and not state.is_final():
                    client.set_flow_run_state(run, Cancelling(message="The run that waited for it was stopped."))
            except (httpx.HTTPError, PrefectHTTPStatusError):
                continue  # it goes on, and its model is kept
