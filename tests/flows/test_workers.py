"""`lors up`, a run on its workers of which one is killed, a failure that is reported, `lors down`.

The workers share nothing with the run but the server and a bucket: their staging folder is another one.
"""

from __future__ import annotations

import http.server
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from flows_helpers import tiny, written
from processes import within
from s3_server import aws_environment, make_bucket, s3_server
from services_helpers import Services, digests, ended, free_port, own_environment

from lors.starter import MODEL_FOLDER

SECRETS = ("planted-key-of-the-bucket", "planted-path-of-the-hook")
pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="reads /proc")


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    folder = tmp_path_factory.mktemp("services")
    posted: list[dict[str, Any]] = []

    class Hook(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            posted.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    hook = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hook)
    threading.Thread(target=hook.serve_forever, daemon=True).start()
    environment = own_environment(folder) | {"LORS_CHECKPOINT_SECONDS": "0.2"}
    with s3_server() as endpoint:
        make_bucket(endpoint, "experiments")
        environment |= aws_environment(endpoint, SECRETS[0]) | {"LORS_STAGING": str(folder / "staging")}
        made = Services(folder, environment, free_port(), posted)
        notify = f"http://127.0.0.1:{hook.server_port}/{SECRETS[1]}"
        try:
            done = made.lors(
                *("up", "--port", str(made.port), "--workers", "2", "--json"),
                LORS_NOTIFY_URL=notify,
                LORS_STAGING=str(folder / "staging of workers"),
            )
            assert done.returncode == 0, done.stderr
            yield made
        finally:
            made.lors("down")
            hook.shutdown()


def test_a_run_on_workers_ends_as_one_without_though_a_worker_s_run_is_killed(
    services: Services, tmp_path: Path
) -> None:
    base = shutil.copytree(MODEL_FOLDER, tmp_path / "base")
    changes: dict[str, Any] = {"base": str(base), "tasks": ["transcribe"], "merge": {"scaling": 0.5}}
    changes |= {"finetune": {"steps": 40, "learning_rate": 1e-3, "batch_seconds": 24}, "diagnose": False}
    corpora = {"source": "synthetic", "utterances": {"train": 24, "validation": 2, "test": 2}}
    for name, place in (("here", {}), ("there", {"store": "s3://experiments/there"})):
        (tmp_path / name).mkdir()
        written(tmp_path / name / "e.yaml", tiny(tmp_path / name, corpora=corpora, **changes) | place)
    api = {"PREFECT_API_URL": f"http://127.0.0.1:{services.port}/api"}
    here = services.lors("run", str(tmp_path / "here" / "e.yaml"), **api)
    assert here.returncode == 0, here.stderr

    command = [sys.executable, "-m", "flows.cli", "run", str(tmp_path / "there" / "e.yaml"), "--on", "workers"]
    run = subprocess.Popen(command, env=services.environment, stderr=subprocess.PIPE, text=True)
    work = services.folder / "staging of workers" / "experiments" / "there" / "work" / "fine_tune"
    assert within(120, lambda: any(work.glob("*/training/checkpoint.safetensors")))
    workers = [process for name, process in services.processes().items() if name.startswith("lors-gpu")]
    killed = next(child for worker in workers for child in worker.children())
    killed.kill()
    _, said = run.communicate(timeout=300)
    assert run.returncode == 0, said
    assert "trying again after: the worker's run train " in said
    assert digests(tmp_path / "here" / "out") == digests(tmp_path / "there" / "out")

    runs = services.trainings()
    assert sorted(run["state"]["type"] for run in runs) == ["COMPLETED", "COMPLETED", "CRASHED"]
    assert {run["name"] for run in runs} == {"train es-transcribe", "train fr-transcribe"}
    assert all({"lors", "task:transcribe"} < set(run["tags"]) for run in runs)

    # Finished experts are not sent again, and what is cached says so.
    again = services.lors("run", str(tmp_path / "there" / "e.yaml"), "--on", "workers")
    assert again.returncode == 0, again.stderr
    assert "\n0 steps computed" in again.stdout
    assert len(services.trainings()) == 3


def test_a_failed_run_is_reported(services: Services) -> None:
    deployment = services.ask("GET", "/deployments/name/full-pipeline/full-pipeline")
    assert deployment["schedules"][0]["active"] is False
    body = {"parameters": {"file": str(services.folder / "none.yaml")}, "state": {"type": "SCHEDULED"}}
    services.ask("POST", f"/deployments/{deployment['id']}/create_flow_run", body)
    assert within(90, lambda: bool(services.posted))
    assert services.posted[0]["flow"] == "full-pipeline"
    assert services.posted[0]["state"] == "Failed"
    assert "none.yaml does not exist" in services.posted[0]["text"]


def test_no_secret_is_kept_in_the_clear(services: Services) -> None:
    """The address of a notification is in a block, which Prefect encrypts; the bucket's key is nowhere."""
    files = [path for path in services.folder.rglob("*") if path.is_file()]
    assert any(path.name == "prefect.db" for path in files)
    for secret in SECRETS:
        assert [str(path) for path in files if secret.encode() in path.read_bytes()] == []


def test_the_server_answers_on_loopback_alone(services: Services) -> None:
    served = services.processes()["server"]
    listening = {
        connection.laddr.ip
        for process in (served, *served.children(recursive=True))
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening == {"127.0.0.1"}


def test_up_twice_starts_what_is_missing_and_down_stops_everything(services: Services) -> None:
    deployment = services.ask("GET", "/deployments/name/full-pipeline/full-pipeline")
    resumed = f"/deployments/{deployment['id']}/schedules/{deployment['schedules'][0]['id']}"
    services.ask("PATCH", resumed, {"active": True})
    before = services.processes()
    before["lors-gpu-1"].kill()
    assert within(10, lambda: ended(before["lors-gpu-1"]))
    up = services.lors("up", "--port", str(services.port), "--workers", "2")
    assert up.returncode == 0, up.stderr
    deployment = services.ask("GET", "/deployments/name/full-pipeline/full-pipeline")
    assert [schedule["active"] for schedule in deployment["schedules"]] == [True]
    after = services.processes()
    assert {name for name in after if after[name] != before.get(name)} == {"lors-gpu-1"}

    everything = services.everything()
    down = services.lors("down")
    assert down.stdout.startswith("Stopped ")
    assert within(10, lambda: all(map(ended, everything)))
    assert services.lors("down").stdout == "Nothing that `lors up` started is running.\n"
    lost = services.lors("run", str(written(services.folder / "e.yaml", tiny(services.folder))), "--on", "workers")
    assert lost.returncode == 2
    assert lost.stderr.endswith(
        "lors: workers need a Prefect server: start one with `lors up`, or set PREFECT_API_URL\n"
    )
