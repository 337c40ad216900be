"""A real HTTP server on this machine that misbehaves on demand, for the scripts that download."""

import json
import re
import subprocess
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass(frozen=True)
class Reply:
    """One answer that is not the plain one."""

    status: int = 200
    body: bytes | None = None  # instead of the file
    cut: int | None = None  # the connection breaks after so many bytes of the body; the headers promise all of it
    ignore_range: bool = False  # all of the file with status 200, whatever part was asked for
    headers: dict[str, str] = field(default_factory=dict)
    gate: threading.Event | None = None  # after the cut: the connection hangs until the event, or for a minute


@dataclass(frozen=True)
class Request:
    """What a client asked for."""

    method: str
    path: str  # without the slash in front
    query: str
    start: int | None  # of the Range header
    user_agent: str


class LocalServer(ThreadingHTTPServer):
    """Serves `files` (path to content) on a free port, with byte ranges; `with LocalServer() as server: ...`."""

    daemon_threads = True
    block_on_close = False

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.headers: dict[str, dict[str, str]] = defaultdict(dict)  # further headers, by path
        self.requests: list[Request] = []
        self._replies: dict[str, Iterator[Reply]] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def misbehave(self, path: str, replies: Iterable[Reply]) -> None:
        """Answer the next GETs of `path` with these; afterwards with the file."""
        self._replies[path] = iter(replies)

    def next_reply(self, method: str, path: str) -> Reply:
        return next(self._replies.get(path, iter(())), Reply()) if method == "GET" else Reply()

    def requested(self, path: str) -> list[int]:
        """First byte of each GET of `path`, in order."""
        return [request.start or 0 for request in self.requests if (request.method, request.path) == ("GET", path)]

    def handle_error(self, request, client_address) -> None:
        """Clients that are killed break their connections: no reason for a traceback."""

    def __enter__(self) -> "LocalServer":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: LocalServer

    def do_GET(self) -> None:
        path, _, query = self.path.lstrip("/").partition("?")
        asked = self.headers.get("Range", "")
        first, _, last = asked.removeprefix("bytes=").partition("-")
        start, stop = int(first) if asked else None, int(last) + 1 if last else None
        self.server.requests.append(Request(self.command, path, query, start, self.headers.get("User-Agent", "")))
        reply = self.server.next_reply(self.command, path)
        content = self.server.files.get(path) if reply.body is None else reply.body
        status = 404 if content is None and reply.status == 200 else reply.status
        if status != 200:
            missing = {"X-Error-Code": "EntryNotFound"} if status == 404 else {}
            self._send(status, b"<html>no</html>", missing | reply.headers)
        elif start is None or reply.ignore_range:
            self._send(200, content, reply=reply)
        elif start >= len(content):
            self._send(416, b"", {"Content-Range": f"bytes */{len(content)}"})
        else:
            part = content[start:stop]
            span = {"Content-Range": f"bytes {start}-{start + len(part) - 1}/{len(content)}"}
            self._send(206, part, span, reply)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        """Answers with those entries of a list whose paths are asked for, as the hub does."""
        asked = self.rfile.read(int(self.headers["Content-Length"])).decode()
        entries = json.loads(self.server.files[self.path.lstrip("/")])
        self._send(200, json.dumps([entry for entry in entries if entry["path"] in asked]).encode())

    def _send(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, reply: Reply | None = None
    ) -> None:
        self.send_response(status)
        path = self.path.lstrip("/").partition("?")[0]
        for name, value in (self.server.headers[path] | (headers or {})).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = reply.cut if reply else None
        self.wfile.write(body if cut is None else body[:cut])
        if cut is not None:
            self.wfile.flush()
            if reply.gate:
                reply.gate.wait(60)
            self.close_connection = True

    def log_message(self, *_) -> None:
        """The tests read `LocalServer.requests` instead."""


def assert_one_line(result: subprocess.CompletedProcess, *words: str, status: int = 2) -> None:
    """The script failed with one line that has these words, and without a presigned link's secret."""
    assert result.returncode == status, result.stdout + result.stderr
    assert re.fullmatch(r"download_\w+\.sh: error: .*\n", result.stderr), result.stderr
    assert [word for word in words if word not in result.stderr] == [], result.stderr
    assert "SeCrEt" not in result.stdout + result.stderr
