"""Planted tokens are found nowhere after a run and after flows that fail; no result is a pickle; the run's own API
answers this machine alone."""

from __future__ import annotations

import base64
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest
from flows_helpers import tiny, written

SECRETS = {
    "HF_TOKEN": "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",
    "HUGGING_FACE_HUB_TOKEN": "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",
    "AWS_ACCESS_KEY_ID": "AKIAPLANTEDPLANTED00",
    "AWS_SECRET_ACCESS_KEY": "planted/s3+secret/PlantedPlantedPlanted0",
    "AWS_SESSION_TOKEN": "planted-session-token-planted",
    "LORS_NOTIFY_URL": "https://hooks.example.org/planted-hook-path",
    "PREFECT_API_KEY": "pnu_PlantedPrefectKeyPlantedPrefectK",
    "PREFECT_SERVER_API_AUTH_STRING": "admin:planted-password-of-the-server",
    "PREFECT_API_AUTH_STRING": "admin:planted-password-of-the-server",
}
IN_A_URL = "planted-password-in-a-url"
IN_SETTINGS = "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"
PLANTED = [*SECRETS.values(), IN_A_URL, IN_SETTINGS, "planted-hook-path", "planted-password-of-the-server"]


class Echo(http.server.BaseHTTPRequestHandler):
    """A hub and an S3 server that refuse every request and say back what they were sent, as careless ones do."""

    def answer(self) -> None:
        said = " ".join(f"{name}: {value}" for name, value in self.headers.items())
        content = f"<Error><Code>AccessDenied</Code><Message>You sent {said} {self.path}</Message></Error>".encode()
        self.send_response(403)
        self.send_header("X-Error-Message", f"Refused: {said}")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer  # noqa: N815

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def echo() -> Iterator[int]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()


def environment(folder: Path, echo: int) -> dict[str, str]:
    """That of a user with every token there is."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "HF_", "PREFECT_"))}
    own = {
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
        "HF_HOME": str(folder / "hub"),
        "HF_ENDPOINT": f"http://someone:{IN_A_URL}@127.0.0.1:{echo}",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{echo}",
        "AWS_REGION": "us-east-1",
        "AWS_CONFIG_FILE": "/nonexistent",
        "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
        "LORS_STAGING": str(folder / "staging"),
        "NO_PROXY": "127.0.0.1",
    }
    return kept | own | SECRETS


def failing(folder: Path) -> dict[str, dict[str, Any]]:
    """Experiments that end with an error: by the hub, by S3, in a step's child, and by a token in the settings."""
    (folder / "empty").mkdir()
    for split in ("train", "validation", "test"):
        (folder / "empty" / f"{split}.jsonl").write_text("")
    corpora = {"source": "manifest", "path": f"{folder}/empty/{{split}}.jsonl"}
    dataset = {"source": "datasets", "path": "someone/speech", "columns": {"text": "text"}}
    url = f"https://someone:{IN_A_URL}@example.org/model"
    changes: dict[str, dict[str, Any]] = {
        "hub": {"base": "someone/model"},
        "dataset": {"corpora": dataset},
        "step": {"corpora": corpora},
        "bucket": {"store": "s3://planted/store"},
        "url": {"base": url},
        "token": {"base": IN_SETTINGS},
        "key": {"merge": {"weights": {IN_SETTINGS: 1}}},
        "variable": {"base": SECRETS["AWS_SECRET_ACCESS_KEY"]},
    }
    return {name: tiny(folder, languages=["es"], tasks=["transcribe"], **own) for name, own in changes.items()}


@dataclass
class Ran:
    folder: Path
    environment: dict[str, str]
    stdout: str
    stderr: str
    said: dict[str, Any]

    @property
    def records(self) -> Path:
        return self.folder / "store" / "prefect"


@pytest.fixture(scope="module")
def ran(echo: int, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("secrets")
    changes: dict[str, Any] = {"languages": ["es"], "tasks": ["transcribe"], "merge": {"scaling": 0.5}}
    files = [written(folder / "good.yaml", tiny(folder, **changes))]
    files += [written(folder / f"{name}.yaml", own) for name, own in failing(folder).items()]
    (folder / "broken.yaml").write_text(f"base: starter\ntoken: [{IN_SETTINGS}\n")
    files.append(folder / "broken.yaml")
    api = f"http://someone:{IN_A_URL}@127.0.0.1:9/api"
    command = [sys.executable, str(Path(__file__).with_name("secret_run.py")), api, *map(str, files)]
    own = environment(folder, echo) | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, env=own, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for file in folder.glob("*.yaml"):
        file.unlink()  # the user's own, with the tokens in them
    said = json.loads(done.stdout.rstrip().splitlines()[-1])
    return Ran(folder, own, done.stdout, done.stderr, said)


def contents(folder: Path) -> Iterator[tuple[Path, bytes]]:
    """Every file as it is, and what is packed in it: the cells of Parquet, what a page has inside as base64."""
    for path in sorted(folder.rglob("*")) if folder.is_dir() else [folder]:
        if path.is_file() and not path.is_symlink():
            content = path.read_bytes()
            yield path, content
            for packed in re.findall(rb"base64,([A-Za-z0-9+/]+=*)", content):
                yield path, base64.b64decode(packed + b"=" * (-len(packed) % 4))
            if path.suffix == ".parquet":
                yield path, pd.read_parquet(path).astype(str).to_csv().encode() + str(pq.read_schema(path)).encode()


def found(words: Iterable[str], folder: Path, *texts: str) -> set[str]:
    """Where one of the words, as it is or as base64, is seen: files and texts."""
    wanted = [word.encode() for word in words]
    # As base64, too, wherever the word begins in what was encoded; the ends depend on its neighbours.
    wanted += [base64.b64encode(b" " * skip + word)[4:-4] for word in wanted for skip in range(3)]
    seen = {str(path) for path, content in contents(folder) if any(word in content for word in wanted)}
    return seen | {text for text in texts if any(word in text.encode() for word in wanted)}


def test_the_run_and_the_failures_went_as_they_should(ran: Ran) -> None:
    assert ran.said["code"] == 0, ran.stderr
    assert {code for name, code in ran.said["planned"].items() if name != "step"} == {2}
    assert ran.said["planned"]["step"] == 0  # nothing is wrong before its rows are read
    assert ran.said["examined"] == {"hub": 1, "bucket": 1, "key": 1}
    assert '"check": "prefect api"' in ran.stdout
    errors = ran.said["errors"]
    assert "is neither a folder nor a Hugging Face model that can be had here (" in errors["hub"]
    assert "the hub refuses the data set someone/speech" in errors["dataset"]
    assert "refuses s3://planted/store to these credentials (" in errors["bucket"]
    assert "the train split of es is empty" in errors["step"]
    assert "base holds a secret (a token, or a URL with a password)" in errors["token"]
    assert "is not valid YAML" in errors["broken"]
    for name, place in {"url": "base", "token": "base", "key": "merge.weights", "variable": "base"}.items():
        assert f"{name}.yaml: {place} holds a secret" in ran.stderr


def test_no_token_is_left_anywhere(ran: Ran) -> None:
    assert found(PLANTED, ran.folder, ran.stdout, ran.stderr) == set()
    # That the search sees the places where one would be: the database with the logs of the flows that failed, the
    # cells of the hypotheses, the page, the manifests and the records.
    for words in ("Encountered exception during execution", "Traceback (most recent call last)", "someone/speech"):
        assert any("prefect.db" in path for path in found([words], ran.folder / "prefect")), words
    sentence = str(pd.read_parquet(ran.folder / "out" / "hypotheses" / "lors.parquet").reference[0])
    assert str(ran.folder / "out" / "hypotheses" / "lors.parquet") in found([sentence], ran.folder / "out")
    shown = {Path(path).name for path in found(["switched"], ran.folder / "out")}
    assert shown >= {"report.html", "results.csv", "results.json", "results.parquet", "summary.json", "README.md"}
    assert found(["es-transcribe"], ran.folder / "out" / "report.html")
    assert (ran.folder / "store" / "memo.json").is_file()
    assert len(list((ran.folder / "store" / "entries").rglob("manifest.json"))) > 5


def test_every_record_of_prefect_is_plain_json(ran: Ran) -> None:
    """Those of the tasks, and of flows and tasks that failed: their exceptions, by name and message."""
    results = []
    for path in ran.records.iterdir():
        record = json.loads(path.read_bytes())
        if "metadata" in record:
            assert record["metadata"]["serializer"]["type"] == "json", path
            record = json.loads(record["result"])
        results.append(record)
    steps = {result["key"] for result in results if "stage" in result}
    assert {path.parent.name for path in (ran.folder / "store" / "entries").rglob("manifest.json")} >= steps
    assert len(steps) > 5
    failed = [result for result in results if "stage" not in result]
    assert {result["__exc_type__"].partition(".")[0] for result in failed} == {"lors"}
    assert len(failed) >= len(ran.said["errors"]) == 6


def test_every_flow_and_task_has_its_result_as_json() -> None:
    from prefect import Flow

    import flows.pipeline
    from tasks.steps import TASKS

    made = [value for value in vars(flows.pipeline).values() if isinstance(value, Flow)]
    assert len(made) >= 7
    assert {flow.name: flow.result_serializer for flow in made} == {flow.name: "json" for flow in made}
    assert {task.result_serializer for task in TASKS.values()} == {"json"}


def test_the_api_of_a_run_listens_on_this_machine_alone(ran: Ran) -> None:
    assert ran.said["listening"]
    assert set(ran.said["listening"]) == {"127.0.0.1"}
