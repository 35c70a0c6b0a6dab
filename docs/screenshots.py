"""Pictures of report.html for the documentation: `python docs/screenshots.py OUTPUT`, of a run's output folder.

A headless Chromium (LORS_BROWSER names another) by the DevTools protocol, without a driver; the tests use it too.
"""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websockets.sync.client import connect
from websockets.sync.connection import Connection


def find_browser() -> str | None:
    """LORS_BROWSER, or a Chromium on the path."""
    names = (os.environ.get("LORS_BROWSER"), "chromium", "chromium-browser", "google-chrome")
    return next((found for name in names if name and (found := shutil.which(name))), None)


class Page:
    """One tab; everything that its page says or asks for is kept."""

    def __init__(self, socket: Connection) -> None:
        self._socket, self._number = socket, 0
        self.said: list[str] = []
        """Messages of the console, warnings and exceptions."""
        self.asked: list[str] = []
        """Addresses requested."""
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command; its answer."""
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            message = self._receive()
            if message.get("id") == self._number:
                assert "error" not in message, message
                return dict(message["result"])

    def _receive(self, timeout: float = 30) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(self._socket.recv(timeout=timeout))
        method, parameters = message.get("method"), message.get("params", {})
        if method in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            self.said.append(json.dumps(parameters))
        if method == "Network.requestWillBeSent":
            self.asked.append(parameters["request"]["url"])
        return message

    def open(self, where: Path | str, *, width: int, dark: bool = False, height: int = 900) -> None:
        """Load a file or a URL at a width in pixels, and wait for all of it, but for what its scripts ask for later."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", media="screen", features=scheme)
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Page.navigate", url=where if isinstance(where, str) else where.resolve().as_uri())
        while self._receive().get("method") != "Page.loadEventFired":
            pass

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait_for(self, expression: str, seconds: float = 60) -> None:
        """Wait until a JavaScript expression is true."""
        end = time.monotonic() + seconds
        while not self.evaluate(f"Boolean({expression})"):
            assert time.monotonic() < end, f"after {seconds:g} s not yet: {expression}"
            time.sleep(0.2)

    def picture(self, *, whole: bool = False) -> bytes:
        """What is seen, or the whole page, as PNG."""
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        return base64.b64decode(answer["data"])


@contextmanager
def browsing(profile: Path) -> Iterator[Page]:
    """A tab of a new browser; `profile` is an empty folder for what it keeps."""
    program = find_browser()
    assert program is not None
    options = "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --remote-debugging-port=0"
    quiet = "--no-first-run --disable-background-networking --disable-component-update --disable-sync --hide-scrollbars"
    command = [program, *options.split(), *quiet.split(), f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        assert process.stderr is not None
        address = next(line.split()[-1] for line in process.stderr if "DevTools listening on" in line)
        port = address.split(":")[2].split("/")[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list") as answer:
            tab = next(tab for tab in json.load(answer) if tab["type"] == "page")
        # Without pings: their answers wait behind the messages that nobody reads while nothing is asked for.
        with connect(tab["webSocketDebuggerUrl"], max_size=None, proxy=None, ping_interval=None) as socket:
            yield Page(socket)
    finally:
        process.terminate()
        process.wait(20)


PICTURES = Path(__file__).parent / "pictures"


def save(picture: bytes, file: Path) -> None:
    """Write a PNG in 256 colours, which is a third of the size."""
    from PIL import Image

    file.parent.mkdir(exist_ok=True)
    Image.open(io.BytesIO(picture)).convert("RGB").quantize(256).save(file, optimize=True)


VIEWS = {"light": (1400, 1250, False), "dark": (1400, 1250, True), "phone": (390, 1100, False)}


def main(output: Path) -> None:
    """Write a picture a view."""
    from lors.report import write_report

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.html"
        write_report([output], file)
        with browsing(Path(folder) / "profile") as page:
            for name, (width, height, dark) in VIEWS.items():
                page.open(file, width=width, height=height, dark=dark)
                save(page.picture(), PICTURES / f"report-{name}.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
