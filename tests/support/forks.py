"""Commands as processes that need not import torch first: python tests/support/forks.py MODULES, requests on standard input.

This process imports once what commands import, three seconds of work, and forks a child for each of them. What a command is
to other processes (arguments, environment, folder, streams, status) is as ever; whatever is about the start of Python itself
needs a process of its own.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
IMPORTED = (
    "train_model",
    "eval_model",
    "harness.runs.score",
    "harness.runs.session",
    "hydra",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "tqdm",
)


PATIENCE_SECONDS = 2.0  # with processes that leave by themselves after another one has ended badly


class Ended(NamedTuple):
    """What came of a command: the status of each of its processes, and all that they wrote."""

    statuses: list[int]
    output: str
    errors: str

    @property
    def status(self) -> int:
        """Of a command of one process."""
        (status,) = self.statuses
        return status


class Forks:
    """The process that forks, with the code of a project; `streams` is the folder for what commands write to theirs.

    imported: more that these commands import, by the names of modules.
    """

    def __init__(self, streams: Path, project: Path = ROOT, *, imported: Sequence[str] = ()) -> None:
        self.project = project
        self._files = [streams / name for name in ("output", "errors")]
        self._server = subprocess.Popen(
            [sys.executable, str(project / "tests" / "support" / "forks.py"), *imported],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(
        self,
        script: str | Path,
        *arguments: str,
        folder: Path | None = None,
        processes: int = 1,
        environment: Mapping[str, str] | None = None,
    ) -> Ended:
        """A script by one process in this folder and this environment beside os.environ, or by several as under torchrun."""
        assert self._server.stdin is not None and self._server.stdout is not None
        for file in self._files:
            file.write_text("")
        request = {
            "script": str(self.project / script),
            "arguments": arguments,
            "folder": str(folder or self.project),
            "environment": {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
            "processes": processes,
            "streams": list(map(str, self._files)),
        }
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        statuses: list[int] = json.loads(self._server.stdout.readline())
        return Ended(statuses, *(file.read_text() for file in self._files))

    def close(self) -> None:
        self._server.communicate()


def together(request: dict[str, Any]) -> list[int]:
    """The statuses of its processes: as under torchrun they meet by a store that outlives them, and all end with one."""
    processes = request["processes"]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    met = {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": port,
        "TORCHELASTIC_USE_AGENT_STORE": True,
        "WORLD_SIZE": processes,
        "LOCAL_WORLD_SIZE": processes,
    }
    children, statuses = [], dict[int, int]()
    for rank in range(processes):
        child = os.fork()
        if not child:
            meeting = {**met, "RANK": rank, "LOCAL_RANK": rank} if processes > 1 else {}
            os._exit(run(request, {name: str(value) for name, value in meeting.items()}))
        children.append(child)
    store = None
    if processes > 1:  # its thread must not be forked
        store = importlib.import_module("torch.distributed").TCPStore("localhost", port, is_master=True, wait_for_workers=False)
    ended_badly: float | None = None
    while len(statuses) < processes:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            statuses[child] = os.waitstatus_to_exitcode(status)
            if statuses[child] and ended_badly is None:
                ended_badly = time.monotonic()
        elif ended_badly is not None and time.monotonic() - ended_badly > PATIENCE_SECONDS:
            for other in set(children) - set(statuses):
                os.kill(other, signal.SIGTERM)
            ended_badly = math.inf
        else:
            time.sleep(0.02)
    del store
    return [statuses[child] for child in children]


def run(request: dict[str, Any], meeting: dict[str, str]) -> int:
    """The script, in this process; its status."""
    os.environ.clear()
    os.environ.update(request["environment"] | meeting)
    os.chdir(request["folder"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for file, descriptor in zip(request["streams"], (1, 2), strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), descriptor)
    sys.argv = [request["script"], *request["arguments"]]
    try:
        runpy.run_path(request["script"], run_name="__main__")
        return 0
    except SystemExit as error:
        return int(error.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def main() -> None:
    sys.path[0] = str(ROOT)
    for module in (*IMPORTED, *sys.argv[1:]):
        importlib.import_module(module)
    for line in sys.stdin:
        print(json.dumps(together(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
