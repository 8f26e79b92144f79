"""A hub on 127.0.0.1 that serves folders, as far as huggingface_hub and datasets ask."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34


@dataclass
class FakeHub:
    """What is served, and what was asked for.

    Attributes:
        repositories: ("models" or "datasets", owner/name) -> folder.
        address: for HF_ENDPOINT.
        requests: method and path of each.
        cut: of a file's name: how many bytes of its next answer come before the line breaks.
    """

    repositories: dict[tuple[str, str], Path]
    address: str = ""
    requests: list[str] = field(default_factory=list)
    cut: dict[str, int] = field(default_factory=dict)

    def files(self, kind: str, name: str) -> list[dict[str, Any]]:
        folder = self.repositories[kind, name]
        return [
            {
                "type": "file",
                "path": str(path.relative_to(folder)),
                "size": path.stat().st_size,
                "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
            }
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        ]


def _inside(files: list[dict[str, Any]], folder: str) -> list[dict[str, Any]]:
    """What lies in a folder: its files, and the folders in it."""
    listed: dict[str, dict[str, Any]] = {}
    for file in files:
        if folder in ("", file["path"][: len(folder)]):
            first, *rest = file["path"].removeprefix(folder).strip("/").split("/")
            path = f"{folder}/{first}".strip("/")
            listed[path] = {"type": "directory", "path": path, "oid": "0" * 40, "size": 0} if rest else file
    return list(listed.values())


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            self._answer(form=parse_qs(self.rfile.read(int(self.headers["Content-Length"] or 0)).decode()))

        def _answer(self, body: bool = True, form: dict[str, list[str]] | None = None) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"{self.command} {path}")
            words = path.strip("/").split("/")
            if words[0] == "api":
                kind, name, rest = words[1], "/".join(words[2:4]), words[4:]
                if (kind, name) not in hub.repositories:
                    return self._refuse("RepoNotFound")
                return self._json(self._api(kind, name, rest, form), body)
            kind = words.pop(0) if words[0] == "datasets" else "models"
            name, file = "/".join(words[:2]), "/".join(words[4:])
            if (kind, name) not in hub.repositories:
                return self._refuse("RepoNotFound")
            if words[2:3] != ["resolve"] or not (hub.repositories[kind, name] / file).is_file():
                return self._refuse("EntryNotFound")
            self._file(hub.repositories[kind, name] / file, body)

        def _api(self, kind: str, name: str, rest: list[str], form: dict[str, list[str]] | None) -> Any:
            files = hub.files(kind, name)
            if rest[:1] == ["tree"]:
                return _inside(files, "/".join(rest[2:]))
            if rest[:1] == ["paths-info"]:
                wanted = form["paths"] if form else []
                folders = [{"type": "directory", "path": p, "oid": "0" * 40, "size": 0} for p in wanted if p == ""]
                return [file for file in files if file["path"] in wanted] + folders
            siblings = [{"rfilename": file["path"], "size": file["size"], "blobId": file["oid"]} for file in files]
            about = {"private": False, "gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": []}
            return about | {"id": name, "sha": COMMIT, "siblings": siblings, "lastModified": "2026-01-01T00:00:00.000Z"}

        def _file(self, file: Path, body: bool) -> None:
            content = file.read_bytes()
            tag = hashlib.sha1(content).hexdigest()
            asked = self.headers.get("Range", "")
            start = int(asked.removeprefix("bytes=").partition("-")[0]) if asked else 0
            self.send_response(206 if asked else 200)
            if asked:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
                hub.requests.append(f"RANGE {start} {file.name}")
            self.send_header("Content-Length", str(len(content) - start))
            self.send_header("ETag", f'"{tag}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Accept-Ranges", "bytes")
            self.end_headers()
            if body:
                left = hub.cut.pop(file.name, None)
                self.wfile.write(content[start : None if left is None else start + left])
                if left is not None:
                    self.close_connection = True

        def _json(self, content: Any, body: bool) -> None:
            text = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            if body:
                self.wfile.write(text)

        def _refuse(self, code: str) -> None:
            self.send_response(404)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

    return Handler


@contextmanager
def serving(repositories: dict[tuple[str, str], Path]) -> Iterator[FakeHub]:
    """Serves the folders meanwhile."""
    hub = FakeHub(repositories)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
