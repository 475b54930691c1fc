"""A loopback server of plain files, with faults; for downloads that are not from the hub."""

from __future__ import annotations

import threading
import urllib.parse
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class FileServer:
    """Serves the files below a folder; use it as a context manager.

    Faults, which may be set at any time: cut and unavailable: so many answers break off half way, or are 503; corrupt:
    every answer has one wrong byte; silent: nothing is ever answered; parts, unset: every answer is the whole file. `requests`
    counts them by path, `sent` the bytes of all answers.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.cut = 0
        self.unavailable = 0
        self.corrupt = False
        self.silent = False
        self.parts = True
        self.sent = 0
        self.requests: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"files": self}))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> FileServer:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def take(self, fault: str) -> bool:
        """Uses up one of the faults that are counted."""
        with self.lock:
            left = getattr(self, fault)
            setattr(self, fault, max(left - 1, 0))
            return bool(left)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    files: FileServer

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = urllib.parse.unquote(self.path).lstrip("/")
        part = self.headers.get("Range", "")
        probe = part == "bytes=0-0"  # the question whether the server is there meets no fault but silence
        self.files.requests[path] += 0 if probe else 1
        if self.files.silent:
            self.files.closing.wait()
            self.close_connection = True
            return
        file = self.files.root / path
        status = 200 if file.is_file() else 404
        if not probe and self.files.take("unavailable"):
            status = 503
        content = file.read_bytes() if status == 200 else b""
        if self.files.corrupt and not probe:
            middle = len(content) // 2
            content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        if part and not probe and status == 200 and self.files.parts:
            status, content = 206, content[int(part.removeprefix("bytes=").removesuffix("-")) :]
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if status < 300 and not probe and self.files.take("cut"):
            content = content[: len(content) // 2]
            self.close_connection = True
        self.files.sent += len(content)
        self.wfile.write(content)
