"""Pictures of the Prefect UI for docs/ui.md: `python -m docs.ui_pictures`, four minutes on two cores.

A real server with workers, in a temporary folder, runs a small experiment twice; a headless Chromium (see
docs/screenshots.py) looks at it, during the first training too.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from docs.screenshots import PICTURES, Page, browsing, save

EXPERIMENT: dict[str, Any] = {
    "base": "starter",
    "languages": ["es", "fr"],
    "tasks": ["transcribe", "translate"],
    "corpora": {"source": "synthetic", "utterances": {"train": 600, "validation": 40, "test": 60}},
    "finetune": {
        "steps": 100,
        "learning_rate": 3e-4,
        "batch_seconds": 40,
        "tasks": "together",
        "freeze": ["encoder"],
        "preserve": {"weight": 2, "languages": ["en", "es", "fr", "it"], "speech": ["es", "fr"]},
    },
    "prune": {"rank_ratio": 0.25, "density": 0.25},
    "merge": {
        "scaling": {"search": [0.5, 0.75, 1.0, 1.25]},
        "touch_up": {"steps": 200, "scaling": 1.25, "freeze": ["encoder"], "validation": {"every": 200}},
    },
    "compare": ["task_arithmetic"],
    "output": "outputs/small",
}
WIDTH = 1400
ROOT = Path(__file__).parents[1]


class Stack:
    """A server and workers of `lors up`, and runs on them, all in one folder."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{found.getsockname()[1]}"
        self._folder = folder / "speech"
        self._folder.mkdir()
        (self._folder / "small.yaml").write_text(yaml.safe_dump(EXPERIMENT, sort_keys=False), "utf-8")
        own = {"LORS_HOME": str(folder / "lors"), "PREFECT_HOME": str(folder / "prefect"), "PYTHONPATH": str(ROOT)}
        self._environment = {**os.environ, **own}
        self._environment.pop("PREFECT_API_URL", None)

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """A `lors` command, in the folder of the experiment."""
        command = [sys.executable, "-m", "flows.cli", *arguments]
        return subprocess.Popen(command, cwd=self._folder, env=self._environment, stdout=subprocess.DEVNULL)

    def lors(self, *arguments: str) -> None:
        """A `lors` command that succeeds."""
        assert self.start(*arguments).wait() == 0, f"lors {' '.join(arguments)} failed: see above"

    def find(self, kind: str, **query: Any) -> list[dict[str, Any]]:
        """What the API's filter gives, the newest first."""
        order = {"flow_runs": "START_TIME_DESC", "artifacts": "CREATED_DESC"}
        body = json.dumps({**query, **({"sort": order[kind]} if kind in order else {})}).encode()
        request = urllib.request.Request(f"{self.url}/api/{kind}/filter", body, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=300) as answer:  # while trainings have all cores
            found: list[dict[str, Any]] = json.load(answer)
        return found

    def run_of(self, flow: str) -> str:
        """The address of a flow's newest run, once the server has recorded how all its steps ended."""
        run = self.find("flow_runs", flows={"name": {"any_": [flow]}})[0]["id"]
        end = time.monotonic() + 300
        while any(
            step["state_type"] != "COMPLETED" for step in self.find("task_runs", flow_runs={"id": {"any_": [run]}})
        ):
            assert time.monotonic() < end, f"the server did not record how the steps of {run} ended"
            time.sleep(1)
        return f"{self.url}/runs/flow-run/{run}"

    def artifact_of(self, key: str) -> str:
        """The address of the newest artifact of a key."""
        return f"{self.url}/artifacts/artifact/{self.find('artifacts', artifacts={'key': {'any_': [key]}})[0]['id']}"

    def form_of(self, deployment: str) -> str:
        """The address of the form that starts a run of a deployment."""
        found = self.find("deployments", deployments={"name": {"any_": [deployment]}})[0]
        return f"{self.url}/deployments/deployment/{found['id']}/run"


@contextmanager
def serving(folder: Path) -> Iterator[Stack]:
    """`lors up`, then `lors down`."""
    stack = Stack(folder)
    try:
        stack.lors("up", "--port", stack.url.rpartition(":")[2], "--workers", "2")
        yield stack
    finally:
        stack.lors("down")


def says(text: str) -> str:
    """The JavaScript that is true when the page shows a text."""
    return f"document.body.innerText.includes({json.dumps(text)})"


def press(page: Page, selector: str, text: str = "") -> None:
    """Wait for an element that a CSS selector and its whole text tell, and click on it."""
    found = f"[...document.querySelectorAll({json.dumps(selector)})]"
    if text:
        found += f".filter(element => element.innerText.trim() === {json.dumps(text)})"
    page.wait_for(f"{found}.length")
    page.evaluate(f"{found}[0].click()")


def choose(page: Page, value: str) -> None:
    """Wait for a list that has an option with this value, and choose it."""
    option = f"document.querySelector('option[value={value}]')"
    page.wait_for(option)
    page.evaluate(f"{option}.closest('select').value = {json.dumps(value)}")
    page.evaluate(f"{option}.closest('select').dispatchEvent(new Event('change'))")


def still(look: Callable[[], bytes], seconds: float = 60, pause: float = 1.5) -> bytes:
    """What is seen when it no longer changes: graphs are drawn on a canvas, of which the page says nothing. After the
    time, whatever is seen."""
    end, before = time.monotonic() + seconds, look()
    while time.monotonic() < end:
        time.sleep(pause)
        now = look()
        if now == before:
            break
        before = now
    return before


class Camera:
    """Opens pages, waits for what they show, and keeps their pictures."""

    def __init__(self, page: Page) -> None:
        self.page = page

    def open(self, address: str, *texts: str, height: int = 900) -> None:
        """Open a page and wait until it shows the texts."""
        self.page.open(address, width=WIDTH, height=height)
        for text in texts:
            self.page.wait_for(says(text))

    def take(self, name: str, *, moving: bool = False) -> None:
        """Write docs/pictures/prefect-NAME.png, of a page that moves after a moment."""
        picture = still(self.page.picture, 8 if moving else 60)
        save(picture, PICTURES / f"prefect-{name}.png")
        print(f"prefect-{name}.png", file=sys.stderr)


def wait_for_training(stack: Stack, running: subprocess.Popen[bytes], percent: float = 40) -> None:
    """Wait until an expert is trained that far."""
    while running.poll() is None:
        shown = stack.find("artifacts", artifacts={"key": {"like_": "fine-tune-%"}, "type": {"any_": ["progress"]}})
        if any(artifact["data"] >= percent for artifact in shown):
            return
        time.sleep(2)
    raise AssertionError("the run ended before a training was seen")


def take_training(camera: Camera, stack: Stack) -> None:
    """An expert that a worker is training."""
    shown = stack.find("artifacts", artifacts={"key": {"like_": "fine-tune-%-loss"}})
    furthest = max(shown, key=lambda artifact: float(artifact["data"].partition(" %")[0]))
    camera.open(f"{stack.url}/artifacts/artifact/{furthest['id']}", "step", furthest["key"], height=560)
    camera.take("loss", moving=True)
    camera.open(f"{stack.url}/runs/flow-run/{furthest['flow_run_id']}", "Task Runs", "INFO", height=1000)
    choose(camera.page, "TIMESTAMP_DESC")
    camera.take("training", moving=True)


def take_run(camera: Camera, stack: Stack) -> None:
    """A run that computed everything, and its steps."""
    camera.open(stack.run_of("full-pipeline"), "Task Runs", height=1100)
    press(camera.page, "li", "Task Runs")
    camera.page.wait_for(says("language:es"))
    camera.take("run")


def take_cached(camera: Camera, stack: Stack) -> None:
    """A run of which every step is cached, then its graph alone, as a grid: Prefect draws none of a run with others in
    it, such as trainings on workers."""
    camera.open(stack.run_of("full-pipeline"), "Task Runs", height=1100)
    press(camera.page, "li", "Task Runs")
    camera.page.wait_for(says("Cached"))
    camera.take("cached")
    press(camera.page, "[aria-label='Run Graph Options']")
    press(camera.page, "input[value=dependency_nearest-parent]")
    still(camera.page.picture)
    press(camera.page, "[title^='Toggle fullscreen']")
    press(camera.page, "[title^='Recenter graph']")
    camera.take("graph")


def take_results(camera: Camera, stack: Stack) -> None:
    """What the run found."""
    camera.open(stack.artifact_of("lors-results"), "mean WER", "report.html", height=1000)
    camera.take("results")
    camera.open(stack.artifact_of("lors-scaling"), "scaling coefficient", height=560)
    camera.take("scaling")


def take_form(camera: Camera, stack: Stack) -> None:
    """The form for a new language, filled in."""
    camera.open(stack.form_of("add-language"), "Whisper's code of the new language.", "Submit", height=1350)
    camera.page.evaluate("document.querySelectorAll('textarea')[1].focus()")
    camera.page.call("Input.insertText", text="it")
    camera.page.evaluate("document.activeElement.blur()")
    camera.take("form")


def main() -> None:
    """Write all pictures."""
    folder = tempfile.TemporaryDirectory(prefix="lors-ui-", ignore_cleanup_errors=True)
    with folder as name, browsing(Path(name) / "profile") as page:
        camera = Camera(page)
        with serving(Path(name)) as stack:
            running = stack.start("run", "small.yaml", "--on", "workers")
            try:
                wait_for_training(stack, running)
                take_training(camera, stack)
                camera.open("about:blank")  # which asks the server for nothing meanwhile
                assert running.wait() == 0, "the run failed: see above"
            finally:
                running.terminate()
                running.wait()
            take_run(camera, stack)
            take_results(camera, stack)
            stack.lors("run", "small.yaml", "--on", "workers")
            take_cached(camera, stack)
            take_form(camera, stack)


if __name__ == "__main__":
    main()
