"""A loopback server that plays the Hugging Face hub, with faults: the routes that its libraries use."""

from __future__ import annotations

import hashlib
import json
import re
import urllib.parse
from collections import Counter
from pathlib import Path
from typing import Any

from tests.support.loopback import LoopbackHandler, LoopbackServer, corrupted

REVISION = hashlib.sha1(b"the only commit").hexdigest()


class HubServer(LoopbackServer):
    """Serves root/{datasets,models}/OWNER/NAME/... at commit REVISION; use it as a context manager.

    The faults but `silent` act on file downloads (GET .../resolve/...) alone; a corrupt one has the length and the hashes of
    the right file. stalled: downloads are accepted and never answered. `requests` counts (method, kind) pairs, kind being api
    or file; `downloads` counts the GETs of a file that ask for more than its first byte, by its path in the repository.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(root, _Handler)
        self.stalled = False
        self.requests: Counter[tuple[str, str]] = Counter()
        self.downloads: Counter[str] = Counter()

    def files(self, kind: str, name: str) -> list[str]:
        base = self.root / kind / name
        return sorted(str(path.relative_to(base)) for path in base.rglob("*") if path.is_file())


class _Handler(LoopbackHandler):
    owner: HubServer

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.answer()

    def answer(self) -> None:
        if self.owner.silent:
            self.stay_silent()
            return
        url = urllib.parse.urlsplit(self.path)
        path = urllib.parse.unquote(url.path)
        api = re.fullmatch(r"/api/(datasets|models)/([^/]+/[^/]+)(?:/([a-z-]+)(?:/(.*))?)?", path)
        file = re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.*)", path)
        self.owner.requests[self.command, "api" if api else "file"] += 1
        if api:
            kind, name, action, rest = api.groups()
            recursive = urllib.parse.parse_qs(url.query).get("recursive", ["False"])[0].lower() in ("true", "1")
            self.api(kind, name, action or "revision", rest or "", recursive)
        elif file:
            self.file("datasets" if file[1] else "models", file[2], file[3], file[4])
        else:
            self.missing("EntryNotFound")

    def api(self, kind: str, name: str, action: str, rest: str, recursive: bool) -> None:
        files = self.owner.files(kind, name)
        if not files:
            self.missing("RepoNotFound")
        elif action == "revision":
            siblings = [{"rfilename": file} for file in files]
            self.json(
                {
                    "_id": "0",
                    "id": name,
                    "sha": REVISION,
                    "private": False,
                    "gated": False,
                    "disabled": False,
                    "downloads": 0,
                    "likes": 0,
                    "tags": [],
                    "createdAt": "2026-01-01T00:00:00.000Z",
                    "lastModified": "2026-01-01T00:00:00.000Z",
                    "siblings": siblings,
                }
            )
        elif action == "tree":
            folder = rest.partition("/")[2].strip("/")
            self.json(self.tree(kind, name, files, folder, recursive))
        elif action == "paths-info":
            wanted = urllib.parse.parse_qs(self.body.decode()).get("paths", [])
            if "json" in self.headers.get("Content-Type", ""):
                wanted = json.loads(self.body)["paths"]
            self.json([self.entry(kind, name, file) for file in files if file in wanted])
        else:
            self.missing("EntryNotFound")

    def tree(self, kind: str, name: str, files: list[str], folder: str, recursive: bool) -> list[dict[str, Any]]:
        prefix = folder + "/" if folder else ""
        entries: dict[str, dict[str, Any]] = {}
        for file in files:
            if not file.startswith(prefix):
                continue
            head, slash, _ = file.removeprefix(prefix).partition("/")
            if slash:
                path = prefix + head
                entries[path] = {"type": "directory", "oid": "0" * 40, "size": 0, "path": path}
            if recursive or not slash:
                entries[file] = self.entry(kind, name, file)
        return list(entries.values())

    def entry(self, kind: str, name: str, file: str) -> dict[str, Any]:
        """As the hub states it: files with a text suffix are git blobs, all others lie in LFS."""
        content = (self.owner.root / kind / name / file).read_bytes()
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        entry = {"type": "file", "oid": blob, "size": len(content), "path": file}
        if not file.endswith((".md", ".json")):
            oid = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 134}
        return entry

    def file(self, kind: str, name: str, revision: str, file: str) -> None:
        path = self.owner.root / kind / name / file
        if revision not in (REVISION, "main"):
            return self.missing("RevisionNotFound")
        if not path.is_file():
            return self.missing("EntryNotFound" if self.owner.files(kind, name) else "RepoNotFound")
        download = self.command == "GET" and not file.endswith(".md")
        if download and self.owner.stalled:
            return self.stay_silent()
        if download and self.owner.take("unavailable"):
            return self.json({"error": "try later"}, status=503)
        self.owner.downloads[file] += self.command == "GET" and self.headers.get("Range") != "bytes=0-0"
        entry = self.entry(kind, name, file)
        content = path.read_bytes()
        if download and self.owner.corrupt:
            content = corrupted(content)
        headers = {
            "ETag": f'"{entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]}"',
            "X-Repo-Commit": REVISION,
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        status = 200
        if requested := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(requested[1]), int(requested[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{min(last, len(content) - 1)}/{len(content)}"
            content, status = content[first : last + 1], 206
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return None
        if download and len(content) > 1 and self.owner.take("cut"):
            content = content[: len(content) // 2]
            self.close_connection = True
        self.wfile.write(content)
        return None

    def json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        for key, text in (headers or {}).items():
            self.send_header(key, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def missing(self, code: str) -> None:
        self.json({"error": code}, status=404, headers={"X-Error-Code": code, "X-Repo-Commit": REVISION})
