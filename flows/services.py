"""`lors up | down`: a Prefect server, its pools, deployments and automations, and workers, on one machine."""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil

from flows.prefect_environment import FEWER_TRANSACTIONS, HEARTBEAT_SECONDS
from lors.errors import InputError, LorsError
from lors.files import write_json

__all__ = ["add_commands", "server_url"]

_DEPLOYMENTS = Path(__file__).parents[1] / "deployments" / "prefect.yaml"
_START_SECONDS, _STOP_SECONDS = 180.0, 40.0
_MAIN_FLOWS = ["full-pipeline", "merge-and-evaluate", "add-language", "remove-language"]
_DEPLOY_AGAIN = (5.0, 20.0)
_SILENT_SECONDS = 3 * int(HEARTBEAT_SECONDS)


def add_commands(add: Callable[..., Any]) -> None:
    """Add the commands of this module to the parser."""
    up = add(
        "up",
        _up,
        "Start a Prefect server, its pools and deployments, and workers on this machine; what runs already is kept.",
        "lors up",
        "lors up --workers 2 --notify https://hooks.example.org/speech",
    )
    up.add_argument("--host", default="127.0.0.1", help="the server's address (default: this machine alone)")
    up.add_argument("--port", type=int, default=4200, help="the server's port (default 4200)")
    up.add_argument(
        "--workers", type=int, metavar="N", help="that train (default: one a GPU; without GPUs one for two cores)"
    )
    up.add_argument(
        "--notify", metavar="URL", help="gets a POST when a run fails (or LORS_NOTIFY_URL, for a secret one)"
    )
    add("down", _down, "Stop what `lors up` started; runs write their checkpoints first.", "lors down")


def server_url() -> str:
    """PREFECT_API_URL, or the server that `lors up` started; raises InputError where there is neither."""
    if url := os.environ.get("PREFECT_API_URL"):
        return url
    state = _State()
    if state.url is None or not state.alive("server"):
        raise InputError("workers need a Prefect server: start one with `lors up`, or set PREFECT_API_URL")
    return state.url


class _State:
    """What was started, in LORS_HOME/services.json (LORS_HOME is ~/.lors by default)."""

    def __init__(self) -> None:
        self.home = Path(os.environ.get("LORS_HOME", "~/.lors")).expanduser().absolute()
        self._file = self.home / "services.json"
        try:
            found = json.loads(self._file.read_bytes())
            self.url: str | None = found["url"]
            self.services: dict[str, dict[str, Any]] = dict(found["services"])
        except (OSError, ValueError, KeyError, TypeError):
            self.url, self.services = None, {}

    def save(self) -> None:
        write_json(self._file, {"url": self.url, "services": self.services})

    @contextmanager
    def lock(self) -> Iterator[None]:
        """One `up` or `down` at a time."""
        try:
            self.home.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.home / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise InputError(f"the folder {self.home} cannot be written ({error.strerror}): set LORS_HOME") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError:
            raise LorsError(f"another `lors up` or `lors down` is under way in {self.home}: wait for it") from None
        finally:
            os.close(descriptor)

    def process(self, name: str) -> psutil.Process | None:
        """The process of a service, if it is that one and runs."""
        known = self.services.get(name)
        if known is None:
            return None
        try:
            process = psutil.Process(known["pid"])
            same = abs(process.create_time() - known["created"]) < 1
            return process if same and process.status() != psutil.STATUS_ZOMBIE else None
        except psutil.Error:
            return None

    def alive(self, name: str) -> bool:
        return self.process(name) is not None

    def start(self, name: str, command: list[str], environment: Mapping[str, str]) -> Path:
        """Start a service that outlives this command; its log."""
        log = self.home / "logs" / f"{name}.log"
        log.parent.mkdir(exist_ok=True)
        with log.open("ab") as file:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                start_new_session=True,
                preexec_fn=_hear_sigint,
            )
        self.services[name] = {
            "pid": process.pid,
            "created": psutil.Process(process.pid).create_time(),
            "log": str(log),
        }
        self.save()
        return log


def _hear_sigint() -> None:
    """In a new service: a shell has its background jobs ignore SIGINT, and a Prefect worker ends itself by that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def _up(options: argparse.Namespace) -> int:
    if not _DEPLOYMENTS.is_file():
        raise InputError(f"{_DEPLOYMENTS} is missing: run `lors up` from a checkout of LoRS")
    if options.workers is not None and options.workers < 1:
        raise InputError(f"--workers {options.workers}: at least one worker has to train")
    state = _State()
    with state.lock():
        shown = "127.0.0.1" if options.host == "0.0.0.0" else options.host
        url = f"http://{shown}:{options.port}/api"
        if state.alive("server") and state.url != url:
            raise InputError(f"a server runs already, at {state.url}: stop it with `lors down` first")
        common = {
            "PREFECT_API_URL": url,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
            "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": HEARTBEAT_SECONDS,
            "PREFECT_WORKER_QUERY_SECONDS": os.environ.get("PREFECT_WORKER_QUERY_SECONDS", "2"),
            "LORS_ROOT": str(Path.cwd()),
            "PREFECT_LOGGING_LEVEL": os.environ.get("PREFECT_LOGGING_LEVEL", "INFO"),  # not what is set below
        }
        _start_server(state, options, url, common)
        # Prefect reads these when it is imported, below.
        assert "prefect" not in sys.modules, "Prefect reads its settings when it is imported"
        os.environ.update(common, PREFECT_LOGGING_LEVEL="ERROR")
        _make_pools()
        _deploy(common)
        _automate(options.notify or os.environ.get("LORS_NOTIFY_URL"))
        _start_workers(state, options.workers, common)
    if options.host not in ("127.0.0.1", "localhost", "::1"):
        _say(
            f"the server listens on {options.host}: everybody who reaches port {options.port} can start runs here, "
            "unless PREFECT_SERVER_API_AUTH_STRING sets a password (PREFECT_API_AUTH_STRING for its clients)"
        )
    workers = [name for name in state.services if name != "server"]
    if options.json:
        print(json.dumps({"url": url, "home": str(state.home), "services": state.services}, indent=2))
        return 0
    print(f"The server is {url.removesuffix('/api')}, its workers {', '.join(workers)}; logs in {state.home / 'logs'}.")
    print("Train on them with `lors run FILE --on workers`; stop everything with `lors down`.")
    print(f"Other Prefect commands find it by: export PREFECT_API_URL={url}")
    return 0


def _start_server(state: _State, options: argparse.Namespace, url: str, common: Mapping[str, str]) -> None:
    if state.alive("server"):
        _say(f"the server runs already, at {url}")
        return
    if _healthy(url):
        raise InputError(
            f"another server answers at {url}: choose a --port, or use it: "
            f"PREFECT_API_URL={url} prefect --no-prompt deploy --all --prefect-file deployments/prefect.yaml"
        )
    state.url, state.services = url, {}
    command = [sys.executable, "-m", "flows.prefect_server", "prefect", "server", "start"]
    command += ["--host", options.host, "--port", str(options.port)]
    log = state.start("server", command, {**common, **FEWER_TRANSACTIONS})
    _say(f"starting the server at {url}")
    end = time.monotonic() + _START_SECONDS
    while not _healthy(url):
        if not state.alive("server"):
            raise LorsError(f"the Prefect server ended at once: {_last_words(log)} (log: {log})")
        if time.monotonic() > end:
            raise LorsError(f"the Prefect server did not answer within {_START_SECONDS:g} s (log: {log})")
        time.sleep(0.5)


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, ValueError, urllib.error.URLError):
        return False


def _last_words(log: Path) -> str:
    lines = [line.strip() for line in log.read_text("utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


def _make_pools() -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectAlreadyExists
    from prefect.workers.process import ProcessWorker

    template = ProcessWorker.get_default_base_job_template()
    with get_client(sync_client=True) as client:
        for name, about in (
            ("lors-cpu", "Merging, evaluation and the runs that send trainings to lors-gpu."),
            ("lors-gpu", "Trainings; each worker has one GPU and takes one run at a time."),
        ):
            pool = WorkPoolCreate(name=name, type="process", base_job_template=template, description=about)
            try:
                client.request("POST", "/work_pools/", json=pool.model_dump(mode="json", exclude_unset=True))
            except ObjectAlreadyExists:
                continue
            except Exception as error:
                if getattr(getattr(error, "response", None), "status_code", None) != 409:
                    raise LorsError(f"the work pool {name} could not be made: {error}") from error


def _deploy(common: Mapping[str, str]) -> None:
    """Make the deployments. A schedule that somebody resumed stays so, though the file has it paused."""
    from prefect.client.orchestration import get_client

    _say("making the deployments")
    with get_client(sync_client=True) as client:
        resumed = {name for name, _, schedule in _schedules(client) if schedule["active"]}
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(_DEPLOYMENTS)]
    for delay in (*_DEPLOY_AGAIN, None):
        done = subprocess.run(command, env={**os.environ, **common}, capture_output=True, text=True)
        if done.returncode == 0:
            break
        if delay is not None:  # a server that was just killed is busy with what it was at
            time.sleep(delay)
    else:
        said = " ".join((done.stdout + done.stderr).split())
        raise LorsError(f"the deployments of {_DEPLOYMENTS} could not be made: {said[-500:]}")
    with get_client(sync_client=True) as client:
        for name, deployment, schedule in _schedules(client):
            if name in resumed and not schedule["active"]:
                address = f"/deployments/{deployment}/schedules/{schedule['id']}"
                client.request("PATCH", address, json={"active": True})


def _schedules(client: Any) -> Iterator[tuple[tuple[str, str], str, dict[str, Any]]]:
    """Each with a name that making the deployments anew does not change, and its deployment's id."""
    for deployment in client.request("POST", "/deployments/filter", json={}).json():
        for schedule in deployment["schedules"]:
            about = json.dumps(schedule["schedule"], sort_keys=True)
            yield (deployment["name"], about), deployment["id"], schedule


def _automate(notify: str | None) -> None:
    """Have the server end runs that give no sign of life, and report failures to a webhook."""
    from prefect.blocks.webhook import Webhook
    from prefect.client.orchestration import get_client
    from prefect.events.actions import CallWebhook, ChangeFlowRunState
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
    from prefect.events.schemas.events import ResourceSpecification
    from prefect.states import StateType

    def ended(*names: str) -> set[str]:
        return {f"prefect.flow-run.{name}" for name in names}

    silent = AutomationCore(
        name="lors: end runs without a heartbeat",
        description="A run whose machine or process is gone crashes, so that it can be tried again.",
        trigger=EventTrigger(
            after={"prefect.flow-run.heartbeat"},
            expect=ended("heartbeat", "Completed", "Failed", "Cancelled", "Crashed"),
            match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]}),
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=_SILENT_SECONDS),
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED,
                message=f"No heartbeat for {_SILENT_SECONDS} s: its process or machine is gone.",
            )
        ],
    )
    wanted = [silent]
    if notify is not None:
        block = Webhook(method="POST", url=notify)  # the block keeps its address encrypted
        document: Any = block.save("lors-notify", overwrite=True)
        payload = {
            "text": "{{ flow.name }} {{ flow_run.name }}: {{ flow_run.state.name }}. {{ flow_run.state.message }}",
            "flow": "{{ flow.name }}",
            "run": "{{ flow_run.name }}",
            "state": "{{ flow_run.state.name }}",
        }
        wanted.append(
            AutomationCore(
                name="lors: report failed runs",
                trigger=EventTrigger(
                    expect=ended("Failed", "Crashed"),
                    match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]}),
                    match_related=ResourceSpecification(
                        {"prefect.resource.role": ["flow"], "prefect.resource.name": _MAIN_FLOWS}
                    ),
                    posture=Posture.Reactive,
                    threshold=1,
                    within=timedelta(0),
                ),
                actions=[CallWebhook(block_document_id=document, payload=json.dumps(payload))],
            )
        )
    with get_client(sync_client=True) as client:
        for automation in wanted:
            for old in client.read_automations_by_name(automation.name):
                client.delete_automation(old.id)
            client.create_automation(automation)


def _start_workers(state: _State, count: int | None, common: Mapping[str, str]) -> None:
    from lors.resources import cores, devices

    found = devices()
    if count is None:
        count = len(found) or max(1, cores() // 2)
    if found and count > len(found):
        raise InputError(f"--workers {count}: this machine has {len(found)} GPUs, and one GPU takes one training")
    share = {"LORS_CORES": str(max(1, cores() // count))}
    places = {f"lors-gpu-{index}": {"CUDA_VISIBLE_DEVICES": found[index]} if found else share for index in range(count)}
    for name, own in {"lors-cpu-0": {}, **places}.items():
        if state.alive(name):
            _say(f"the worker {name} runs already")
            continue
        pool, limit = ("lors-cpu", "8") if name == "lors-cpu-0" else ("lors-gpu", "1")
        command = [
            sys.executable,
            "-m",
            "prefect",
            "worker",
            "start",
            "--pool",
            pool,
            "--name",
            name,
            "--type",
            "process",
        ]
        state.start(name, [*command, "--limit", limit, "--install-policy", "never"], {**common, **own})
        _say(f"started the worker {name}" + (f" with GPU {own['CUDA_VISIBLE_DEVICES']}" if found and own else ""))


def _down(options: argparse.Namespace) -> int:
    state = _State()
    stopped = []
    with state.lock():
        # The workers first, so that they can still tell the server how their runs ended.
        for names in ([name for name in state.services if name != "server"], ["server"]):
            running = {name: process for name in names if (process := state.process(name)) is not None}
            below = [child for process in running.values() for child in _children(process)]
            for process in (*running.values(), *below):
                _signal(process.terminate)
            _, late = psutil.wait_procs([*running.values(), *below], timeout=_STOP_SECONDS)
            for process in late:
                _signal(process.kill)
            psutil.wait_procs(late, timeout=10)
            stopped += running
        state.services = {}
        state.url = None
        state.save()
    if options.json:
        print(json.dumps({"stopped": stopped}, indent=2))
    else:
        print(f"Stopped {', '.join(stopped)}." if stopped else "Nothing that `lors up` started is running.")
    return 0


def _children(process: psutil.Process) -> list[psutil.Process]:
    """The runs of a worker: Prefect's workers leave them behind."""
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def _signal(send: Callable[[], None]) -> None:
    try:
        send()
    except psutil.Error:
        return
