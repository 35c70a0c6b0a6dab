"""What tests/flows/test_secrets.py runs in a process of its own: quick commands on experiments that fail, a run that
ends well, then flows that fail.

Arguments: a Prefect API for the quick commands, the good experiment, those that fail. The last line of standard output
is JSON: the exit codes, the flows' errors, and where the run's own API listens.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def main() -> None:
    from flows.cli import main as lors

    api, experiment, *failing = sys.argv[1:]
    os.environ["PREFECT_API_URL"] = api
    planned = {Path(file).stem: lors(["plan", file, "--json"]) for file in failing}
    examined = {Path(file).stem: lors(["doctor", file, "--json"]) for file in failing[::3]}
    del os.environ["PREFECT_API_URL"]
    code = lors(["run", experiment, "--json"])
    import psutil

    from flows.pipeline import full_pipeline

    served = [child for child in psutil.Process().children(recursive=True) if "uvicorn" in child.cmdline()]
    listening = [c.laddr.ip for process in served for c in process.net_connections("tcp") if c.status == "LISTEN"]
    errors = {}
    for file in failing:
        if Path(file).stem in ("url", "key", "variable"):  # as "token"
            continue
        try:
            full_pipeline(file=Path(file))
        except Exception as error:
            errors[Path(file).stem] = f"{type(error).__name__}: {error}"
    codes = {"planned": planned, "examined": examined, "code": code}
    print(json.dumps({**codes, "errors": errors, "listening": listening}))


if __name__ == "__main__":
    main()
