"""A local stand-in for the model hub: the few paths of its API that a download uses."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMITS = {"main": "a" * 40, "v1": "b" * 40}


class Hub:
    """What the server offers, and what it was asked for."""

    def __init__(self, repos: dict[tuple[str, str], Path]):
        self.repos = repos  # (hub id, revision) → folder
        self.gated: set[str] = set()
        self.forbidden: set[str] = set()  # names of files that nobody gets
        self.fails_with: int | None = None  # a status that answers everything
        self.cut_after: int | None = None  # bytes of a file after which the connection is closed
        self.requests: list[tuple[str, str, str | None]] = []  # (method, path, Range header)

    def folder(self, hub_id: str, revision: str) -> Path | None:
        names = {commit: name for name, commit in COMMITS.items()}
        by_commit = self.repos.get((hub_id, revision))
        return by_commit or self.repos.get((hub_id, names.get(revision, revision)))

    def fetched(self) -> set[str]:
        """Names of the files that were sent."""
        return {path.split("/")[-1] for method, path, _ in self.requests if method == "GET" and "/resolve/" in path}


@contextlib.contextmanager
def serve(hub: Hub) -> Iterator[str]:
    """Run the hub on a free port; yields its address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, with_body: bool) -> None:
            hub.requests.append((self.command, self.path, self.headers.get("Range")))
            if hub.fails_with is not None:
                self.refuse(hub.fails_with, "")
                return
            path = self.path.split("?")[0].strip("/")
            if path.startswith("api/models/"):
                owner, name, what, revision = path.removeprefix("api/models/").split("/")[:4]
                self.describe(f"{owner}/{name}", what, revision)
            else:
                owner, name, _, revision, *rest = path.split("/")
                self.send(f"{owner}/{name}", revision, "/".join(rest), with_body)

        def refuse(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def may_have(self, hub_id: str, revision: str) -> Path | None:
            if hub_id in hub.gated:
                self.refuse(401, "GatedRepo")
                return None
            folder = hub.folder(hub_id, revision)
            if folder is None:
                known = any(known == hub_id for known, _ in hub.repos)
                self.refuse(404 if known else 401, "RevisionNotFound" if known else "RepoNotFound")
            return folder

        def describe(self, hub_id: str, what: str, revision: str) -> None:
            if (folder := self.may_have(hub_id, revision)) is None:
                return
            files = sorted(path for path in folder.iterdir() if path.is_file())
            if what == "tree":
                entries = [{"type": "file", "path": p.name, "size": p.stat().st_size, "oid": etag(p)} for p in files]
                content: object = entries
            else:
                siblings = [{"rfilename": path.name} for path in files]
                content = {
                    "id": hub_id,
                    "modelId": hub_id,
                    "sha": COMMITS.get(revision, revision),
                    "siblings": siblings,
                }
            body = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def send(self, hub_id: str, revision: str, name: str, with_body: bool) -> None:
            if (folder := self.may_have(hub_id, revision)) is None:
                return
            if with_body and name in hub.forbidden:
                self.refuse(403, "Forbidden")
                return
            content = (folder / name).read_bytes()
            requested = self.headers.get("Range")
            start = int(requested.removeprefix("bytes=").split("-")[0]) if requested else 0
            part = content[start:]
            self.send_response(206 if requested else 200)
            self.send_header("ETag", f'"{etag(folder / name)}"')
            self.send_header("X-Repo-Commit", COMMITS.get(revision, revision))
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(part)))
            if requested:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.end_headers()
            if with_body and hub.cut_after is not None and len(part) > hub.cut_after:
                self.wfile.write(part[: hub.cut_after])
                self.wfile.flush()
                self.close_connection = True
            elif with_body:
                self.wfile.write(part)

        def log_message(self, *_: object) -> None:
            """Keep quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
