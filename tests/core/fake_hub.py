"""As much of the hub's HTTP interface as huggingface_hub 2.4 uses, over folders, with a log and planned accidents."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FakeHub:
    """``repos`` maps 'org/name' to a folder. ``log`` holds (method, path, Range header) of every request.

    ``cut``: file -> bytes after which its next download breaks off. ``refuse``: file -> downloads still to be refused.
    """

    repos: dict[str, Path]
    log: list[tuple[str, str, str | None]] = field(default_factory=list)
    cut: dict[str, int] = field(default_factory=dict)
    refuse: Counter[str] = field(default_factory=Counter)

    def __enter__(self) -> FakeHub:
        handler = type("Handler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        return self

    def __exit__(self, *error: Any) -> None:
        self.server.shutdown()
        self.server.server_close()

    def downloads(self, ending: str = "") -> list[str]:
        """Names of the files asked for, in order."""
        files = [path for method, path, _ in self.log if method == "GET" and "/resolve/" in path]
        return [path.rpartition("/")[2] for path in files if path.endswith(ending)]


class Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.hub.log.append((self.command, path, self.headers.get("Range")))
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self.api("/".join(parts[2:4]), parts[4:])
        elif len(parts) >= 5 and parts[2] == "resolve":
            self.file("/".join(parts[:2]), "/".join(parts[4:]))
        else:
            self.answer(404)

    def api(self, repo: str, rest: list[str]) -> None:
        if repo not in self.hub.repos:
            return self.answer(404, {"X-Error-Code": "RepoNotFound"})
        folder = self.hub.repos[repo]
        files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
        if rest[:1] == ["tree"]:
            sizes = {name: path.stat().st_size for name, path in files.items()}
            found: Any = [{"type": "file", "path": n, "size": sizes[n], "oid": etag(f)} for n, f in files.items()]
        else:
            found = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
        return self.answer(200, {"Content-Type": "application/json"}, json.dumps(found).encode())

    def file(self, repo: str, name: str) -> None:
        if repo not in self.hub.repos:
            return self.answer(404, {"X-Error-Code": "RepoNotFound"})
        path = self.hub.repos[repo] / name
        if not path.is_file():
            return self.answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        if self.command == "GET" and self.hub.refuse[name]:
            self.hub.refuse[name] -= 1
            return self.answer(403)
        data, first = path.read_bytes(), 0
        headers = {"ETag": f'"{etag(path)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if asked := self.headers.get("Range"):
            first = int(asked.removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        cut = self.hub.cut.pop(name, None) if self.command == "GET" else None
        return self.answer(206 if asked else 200, headers, data[first:], cut)

    def answer(
        self, status: int, headers: dict[str, str] | None = None, body: bytes = b"", cut: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut])
        if cut is not None:
            self.close_connection = True  # the rest of what was announced never comes

    def log_message(self, *parts: Any) -> None:
        pass


def etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
