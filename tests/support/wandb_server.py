"""A loopback server that plays W&B: GraphQL, file streams and uploads, as much of them as the real client uses.

It keeps what arrives, so that tests can read it back, and it can go silent the way real servers do.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

import pytest

ENTITY = "tester"
KEY = "0123456789" * 4


@dataclass
class RecordedRun:
    """One run as the server knows it. `lines` holds the raw lines of every streamed file, at their offsets."""

    run_id: str
    project: str
    entity: str | None = None
    display_name: str | None = None
    group: str | None = None
    job_type: str | None = None
    notes: str | None = None
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, dict[int, str]] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    exit_code: int | None = None

    @property
    def history(self) -> list[dict[str, Any]]:
        """The logged rows in order, without the client's own columns (_step, _runtime, ...)."""
        lines = self.lines.get("wandb-history.jsonl", {})
        rows = [json.loads(lines[number]) for number in sorted(lines)]
        return [{key: value for key, value in row.items() if not key.startswith("_")} for row in rows]

    @property
    def summary(self) -> dict[str, Any]:
        """The last summary streamed. Each one replaces the one before."""
        lines = self.lines.get("wandb-summary.json", {})
        return json.loads(lines[max(lines)]) if lines else {}


class WandbServer:
    """`with WandbServer() as server:` listens on 127.0.0.1 at `server.url` and fills `server.runs`."""

    def __init__(self) -> None:
        self.runs: dict[str, RecordedRun] = {}
        self.operations: list[str] = []
        self.bodies: list[bytes] = []  # of every request, as they came
        self.silent = threading.Event()  # set: requests are read and never answered
        self.failing = threading.Event()  # set: requests are answered with an internal error
        self.refusing = 0  # a status that every request is refused with
        self.seconds = 0.0  # that every answer takes
        self.trouble: Callable[[WandbServer], object] | None = None  # begins when a run has been opened
        self.closed = threading.Event()
        self.lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05})
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self.environment = {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY}  # of a client that is to find it

    def __enter__(self) -> WandbServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def serves(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Clients of this process, and of those that it starts."""
        for name, value in self.environment.items():
            monkeypatch.setenv(name, value)

    def close(self) -> None:
        """Stops listening: from now on connections are refused. Silent requests are let go."""
        if self.closed.is_set():
            return
        self.closed.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def only_run(self) -> RecordedRun:
        """The one run that arrived; an assertion error if there are none or several."""
        assert len(self.runs) == 1, f"runs on the server: {sorted(self.runs)}"
        return next(iter(self.runs.values()))

    def answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        """The data of one GraphQL operation; an unknown one gets none."""
        self.operations.append(operation)
        entity = {"id": "entity", "name": variables.get("entity") or ENTITY}
        project = {"id": "project", "name": variables.get("project"), "entity": entity}
        match operation:
            case "Viewer":
                viewer = {"id": "user", "entity": ENTITY, "username": ENTITY, "email": "", "flags": "{}"}
                return {"viewer": {**viewer, "teams": {"edges": []}}}
            case "RunResumeStatus":
                run = self.runs.get(variables["name"])
                return {"model": {**project, "bucket": run and _resume_status(run)}}
            case "UpsertBucket":
                inserted = variables["name"] not in self.runs
                run = self.runs.setdefault(variables["name"], RecordedRun(variables["name"], variables["project"]))
                _update(run, variables)
                bucket = {
                    "id": run.run_id,
                    "name": run.run_id,
                    "displayName": run.display_name,
                    "description": None,
                    "config": json.dumps(run.config),
                    "sweepName": None,
                    "project": project,
                    "historyLineCount": len(run.history),
                }
                return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}
            case "CreateRunFiles":
                base = f"{self.url}/upload/{variables['run']}"
                files = [{"name": name, "uploadUrl": f"{base}/{name}"} for name in variables["files"]]
                return {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": files}}
            case "ArtifactType":
                return {"project": {"artifact": None}}
            case "CreateArtifact":
                # "Committed" tells the client that the server holds this content already. A table's rows arrive a
                # second time among the run's files, where the tests read them.
                sequence = {"id": "sequence", "latestArtifact": {"id": "artifact", "versionIndex": 0}}
                artifact = {"id": "artifact", "state": "COMMITTED", "artifactSequence": sequence}
                return {"createArtifact": {"artifact": artifact}}
            case "OrganizationCoreWeaveOrganizationID":
                return {"entity": {"organization": None}}
            case "ServerFeaturesQuery":
                return {"serverInfo": {"features": []}}
            case "RunStoppedStatus":
                return {"project": {"run": {"stopped": False}}}
            case _:
                return {}

    def receive_stream(self, run_id: str, message: dict[str, Any]) -> None:
        """One POST of a file stream: lines of several files, each from an offset on."""
        run = self.runs[run_id]
        for name, chunk in message.get("files", {}).items():
            lines = run.lines.setdefault(name, {})
            lines.update(enumerate(chunk["content"], start=chunk["offset"]))
        if message.get("complete"):
            run.exit_code = message.get("exitcode")


def _update(run: RecordedRun, variables: dict[str, Any]) -> None:
    """What UpsertBucket says about a run; a null leaves the value as it was."""
    for attribute, key in {
        "entity": "entity",
        "display_name": "displayName",
        "group": "groupName",
        "job_type": "jobType",
        "notes": "notes",
        "tags": "tags",
    }.items():
        if variables.get(key) is not None:
            setattr(run, attribute, variables[key])
    if variables.get("config"):
        config = json.loads(variables["config"])
        run.config = {key: entry["value"] for key, entry in config.items()}


def _resume_status(run: RecordedRun) -> dict[str, Any]:
    """What a client needs to go on with a run that is there already."""
    history = run.lines.get("wandb-history.jsonl", {})
    events = run.lines.get("wandb-events.jsonl", {})
    config = {key: {"value": value} for key, value in run.config.items()}
    return {
        "id": run.run_id,
        "name": run.run_id,
        "displayName": run.display_name,
        "tags": run.tags,
        "notes": run.notes,
        "summaryMetrics": json.dumps(run.summary),
        "config": json.dumps(config),
        "wandbConfig": json.dumps({"t": 1}),
        "historyLineCount": len(history),
        "eventsLineCount": len(events),
        "logLineCount": 0,
        "historyTail": json.dumps([history[max(history)]] if history else []),
        "eventsTail": json.dumps([events[max(events)]] if events else []),
    }


def _handler(server: WandbServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            """Tests read what the client says, not what the server does."""

        def handle(self) -> None:
            with contextlib.suppress(ConnectionError):  # a client that has finished drops its connections
                super().handle()

        def reply(self, value: object) -> None:
            body = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") == "chunked":
                parts = []
                while size := int(self.rfile.readline(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                content = b"".join(parts)
            else:
                content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            return gzip.decompress(content) if self.headers.get("Content-Encoding") == "gzip" else content

        def do_GET(self) -> None:
            self.reply({})

        def do_PUT(self) -> None:
            content = self.body()
            server.bodies.append(content)
            _, upload, run_id, name = unquote(self.path).split("/", 3)
            assert upload == "upload", self.path
            server.runs[run_id].files[name] = content
            self.reply({})

        def do_POST(self) -> None:
            content = self.body()
            server.bodies.append(content)
            server.closed.wait(server.seconds)
            if server.failing.is_set() or server.refusing:
                self.send_response(server.refusing or 500)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if server.silent.is_set():
                server.closed.wait()
                self.close_connection = True
                return
            parts = unquote(self.path).strip("/").split("/")
            if parts == ["graphql"]:
                request = json.loads(content)
                named = re.search(r"(?:query|mutation)\s+(\w+)", request["query"])
                operation = request.get("operationName") or (named.group(1) if named else "")
                with server.lock:
                    data = server.answer(operation, request.get("variables") or {})
                self.reply({"data": data})
                if operation == "UpsertBucket" and server.trouble is not None:
                    server.trouble(server)
            elif parts[0] == "files" and parts[-1] == "file_stream":
                with server.lock:
                    server.receive_stream(parts[-2], json.loads(content))
                self.reply({"exitcode": None, "limits": {}})
            else:
                self.reply({})

    return Handler
