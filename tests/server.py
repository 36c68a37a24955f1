"""A web server on this machine that breaks off, lies and refuses."""

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


class Server(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, bytes] = {}
        self.breaks: dict[str, int] = {}  # files that end after so many bytes
        self.refusal: tuple[int, str] | None = None  # status and code of the answer to everything
        self.asked: list[tuple[str, int]] = []  # path and first byte of every file that was sent


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        path, content = self.do_HEAD()
        with suppress(ConnectionError):  # the client hangs up, to ask again for a range
            self.wfile.write(content[: self.server.breaks.get(path)])

    def do_HEAD(self) -> tuple[str, bytes]:
        """Send the head; returns the path and what is to follow."""
        path = urlsplit(self.path).path.strip("/")
        content = self.server.files.get(path)
        if content is None or self.server.refusal is not None:
            status, code = self.server.refusal or (404, "")
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.end_headers()
            return path, b""
        start = int(self.headers.get("Range", "bytes=0-")[6:].partition("-")[0])
        if self.command == "GET":
            self.server.asked.append((path, start))
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if commit := re.search(r"/resolve/(\w+)/", path):
            self.send_header("X-Repo-Commit", commit[1])
        self.end_headers()
        return path, content[start:]

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield server
        server.shutdown()
