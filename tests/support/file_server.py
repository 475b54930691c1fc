"""A loopback server of plain files, with faults; for downloads that are not from the hub."""

from __future__ import annotations

import urllib.parse
from collections import Counter
from pathlib import Path

from tests.support.loopback import LoopbackHandler, LoopbackServer, corrupted


class FileServer(LoopbackServer):
    """Serves the files below a folder; use it as a context manager.

    parts, unset: every answer is the whole file. `requests` counts the answers by path, `sent` the bytes of all.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(root, _Handler)
        self.parts = True
        self.sent = 0
        self.requests: Counter[str] = Counter()


class _Handler(LoopbackHandler):
    owner: FileServer

    def do_GET(self) -> None:
        path = urllib.parse.unquote(self.path).lstrip("/")
        part = self.headers.get("Range", "")
        probe = part == "bytes=0-0"  # the question whether the server is there meets no fault but silence
        self.owner.requests[path] += 0 if probe else 1
        if self.owner.silent:
            self.stay_silent()
            return
        file = self.owner.root / path
        status = 200 if file.is_file() else 404
        if not probe and self.owner.take("unavailable"):
            status = 503
        content = file.read_bytes() if status == 200 else b""
        if self.owner.corrupt and not probe:
            content = corrupted(content)
        if part and not probe and status == 200 and self.owner.parts:
            status, content = 206, content[int(part.removeprefix("bytes=").removesuffix("-")) :]
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if status < 300 and not probe and self.owner.take("cut"):
            content = content[: len(content) // 2]
            self.close_connection = True
        self.owner.sent += len(content)
        self.wfile.write(content)
