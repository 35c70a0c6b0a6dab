"""A small Hugging Face hub over HTTP: one data set, `who/set`, whose files lie in a folder."""

from __future__ import annotations

import json
import re
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer(ThreadingHTTPServer):
    """`requests` is what it was asked, `gated` whether its files are for those alone who accepted the terms,
    `busy` how many requests more it answers with 503."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), partial(_Handler))
        self.folder, self.gated, self.requests = folder, False, list[str]()
        self.busy = 0


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, format: str, *args: Any) -> None:
        self.server.requests.append(f"{self.command} {self.path}")

    def answer(self, content: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self) -> None:
        self.answer(b"{}", 403, X_Error_Code="GatedRepo", X_Error_Message="Access is restricted")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if self.server.busy > 0:
            self.server.busy -= 1
            self.answer(b"{}", 503)
            return
        root, path = self.server.folder, unquote(urlparse(self.path).path)
        if re.fullmatch("/api/datasets/who/set(/revision/.*)?", path):
            files = [{"rfilename": file.relative_to(root).as_posix()} for file in root.rglob("*.*")]
            info = {"id": "who/set", "sha": COMMIT, "siblings": files, "gated": self.server.gated and "auto"}
            self.answer(json.dumps(info).encode())
        elif path == "/api/datasets/who/set/auth-check":
            self.refuse() if self.server.gated else self.answer(b"{}")
        elif found := re.fullmatch(f"/api/datasets/who/set/tree/{COMMIT}/?(.*)", path):
            about = [
                {"type": "file" if file.is_file() else "directory", "oid": "0" * 40, "size": file.stat().st_size}
                | {"path": file.relative_to(root).as_posix()}
                for file in sorted((root / found[1]).iterdir())
            ]
            self.answer(json.dumps(about).encode())
        elif (found := re.fullmatch(f"/datasets/who/set/resolve/{COMMIT}/(.*)", path)) and (root / found[1]).is_file():
            self.send_file((root / found[1]).read_bytes())
        else:
            self.answer(b"{}", 404, X_Error_Code="EntryNotFound")

    def send_file(self, content: bytes) -> None:
        headers = {"ETag": f'"{len(content)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if self.server.gated:
            self.refuse()
        elif wanted:
            start, end = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            self.answer(content[start : end + 1], 206, **headers)
        else:
            self.answer(content, **headers)
