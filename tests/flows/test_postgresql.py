"""The server on PostgreSQL: `lors up`, a run on its workers, `lors down`."""

from __future__ import annotations

import json
import os
import pwd
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from flows_helpers import tiny, written
from processes import within
from services_helpers import Services, ended, free_port, own_environment


def _programs() -> Path | None:
    """The folder with PostgreSQL's server programs, which Debian leaves out of PATH."""
    on_path = shutil.which("initdb")
    found = [Path(on_path).resolve().parent] if on_path else []
    found += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((folder for folder in found if (folder / "initdb").exists() and (folder / "pg_ctl").exists()), None)


PROGRAMS = _programs()
pytestmark = [
    pytest.mark.skipif(PROGRAMS is None, reason="PostgreSQL is not installed (apt-get install postgresql)"),
    pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="reads /proc"),
]


@dataclass(frozen=True)
class Database:
    """One that an ordinary role owns, on a PostgreSQL of its own."""

    port: int
    password: str

    @property
    def url(self) -> str:
        return f"postgresql+asyncpg://prefect:{self.password}@127.0.0.1:{self.port}/prefect"

    def tell(self, statement: str, role: str = "prefect", database: str = "prefect") -> str:
        assert PROGRAMS is not None
        command = [str(PROGRAMS / "psql"), "-h", "127.0.0.1", "-p", str(self.port), "-U", role, "-d", database]
        environment = {**os.environ, "PGPASSWORD": self.password}
        done = subprocess.run([*command, "-Atc", statement], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


@pytest.fixture(scope="module")
def database() -> Iterator[Database]:
    assert PROGRAMS is not None
    programs = PROGRAMS
    # A folder that an unprivileged user can reach, which pytest's are not: PostgreSQL refuses to run as root.
    folder = Path(tempfile.mkdtemp(prefix="lors-postgresql-"))
    own: dict[str, Any] = {"cwd": folder, "capture_output": True, "text": True}
    if os.geteuid() == 0:
        user = pwd.getpwnam("nobody")
        os.chown(folder, user.pw_uid, user.pw_gid)
        own |= {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    made, data = Database(free_port(), secrets.token_hex(16)), folder / "data"
    word = folder / "password"
    word.write_text(made.password)
    word.chmod(0o644)

    def program(name: str, *arguments: str) -> None:
        done = subprocess.run([str(programs / name), *arguments], **own)
        assert done.returncode == 0, done.stdout + done.stderr

    try:
        program("initdb", "-D", str(data), "-U", "admin", "-A", "scram-sha-256", f"--pwfile={word}", "-E", "UTF8", "-N")
        settings = f"-c listen_addresses=127.0.0.1 -c port={made.port} -c unix_socket_directories={folder} -c fsync=off"
        program("pg_ctl", "-D", str(data), "-l", str(folder / "log"), "-o", settings, "-w", "start")
        try:
            made.tell(f"CREATE ROLE prefect LOGIN PASSWORD '{made.password}'", "admin", "postgres")
            made.tell("CREATE DATABASE prefect OWNER prefect", "admin", "postgres")
            yield made
        finally:
            program("pg_ctl", "-D", str(data), "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_a_run_on_workers_whose_server_keeps_its_records_in_postgresql(database: Database, tmp_path: Path) -> None:
    # One expert: that workers train what a run alone does is in test_workers.py.
    changes: dict[str, Any] = {"languages": ["es"], "tasks": ["transcribe"], "merge": {"scaling": 0.5}}
    file = written(tmp_path / "e.yaml", tiny(tmp_path, diagnose=False, **changes))
    services = Services(tmp_path, own_environment(tmp_path), free_port())
    try:
        up = services.lors(
            "up", "--port", str(services.port), "--workers", "1", PREFECT_SERVER_DATABASE_CONNECTION_URL=database.url
        )
        assert up.returncode == 0, up.stderr
        ran = services.lors("run", str(file), "--on", "workers")
        assert ran.returncode == 0, ran.stderr
        assert "lors" in json.loads((tmp_path / "out" / "summary.json").read_text())["systems"]

        (run,) = services.trainings()
        assert (run["name"], run["state"]["type"]) == ("train es-transcribe", "COMPLETED")
        kept = "SELECT count(*) FROM flow_run JOIN flow ON flow.id = flow_id WHERE flow.name = 'train-expert'"
        assert database.tell(kept) == "1"
        assert not (tmp_path / "prefect" / "prefect.db").exists()
    finally:
        everything = services.everything()
        down = services.lors("down")
    assert down.stdout.startswith("Stopped "), down.stderr
    assert within(10, lambda: all(map(ended, everything)))
    assert database.tell("SELECT count(*) FROM pg_stat_activity WHERE usename = 'prefect'") == "1"
