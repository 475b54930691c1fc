"""What the loopback servers of files have in common: their life, and the faults of their answers."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self


class LoopbackServer:
    """Answers from the files below `root`; use it as a context manager.

    Faults, which may be set at any time: cut and unavailable: so many answers break off half way, or are 503; corrupt: every
    answer has one wrong byte; silent: nothing is ever answered.
    """

    def __init__(self, root: Path, handler: type[LoopbackHandler]) -> None:
        self.root = root
        self.cut = 0
        self.unavailable = 0
        self.corrupt = False
        self.silent = False
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (handler,), {"owner": self}))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> Self:
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


class LoopbackHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: Any

    def log_message(self, *arguments: Any) -> None:
        pass

    def stay_silent(self) -> None:
        """Until the server closes."""
        self.owner.closing.wait()
        self.close_connection = True


def corrupted(content: bytes) -> bytes:
    """With one byte another."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
