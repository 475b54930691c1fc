"""Commands as processes that need not import torch first: python tests/support/forks.py MODULES, requests on standard input.

This process imports once what commands import, three seconds of work, and forks a child for each of them. What a command is
to other processes (arguments, environment, folder, streams, signals, status) is as ever; whatever is about the start of Python
itself needs a process of its own.
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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
IMPORTED = (
    "train_model",
    "eval_model",
    "harness.runs.evaluate_run",
    "harness.runs.session",
    "hydra",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "tqdm",
    "wandb",
)


STARTED = set[int]()  # of those that run beside a test: what a test that has failed leaves is ended
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


class Started:
    """A command of one process that runs beside the test: what is used of subprocess.Popen."""

    def __init__(self, forks: Forks, pid: int) -> None:
        self._forks, self.pid = forks, pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._forks.ask("ended", pid=self.pid)
        return self.returncode

    def wait(self, timeout: float) -> int:
        """Its status. Raises TimeoutExpired."""
        until = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(0.02)
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def wait_for(condition: Callable[[], object], process: Started | subprocess.Popen[str], *, pause: float = 0.02) -> None:
    """Until it holds; the process runs on, and four minutes suffice."""
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(pause)


class Forks:
    """The process that forks, with the code of a project; `streams` is the folder for what commands write to theirs.

    imported: more that these commands import, by the names of modules. held: a command that starts this process, and so holds
    it and all commands.
    """

    def __init__(self, streams: Path, project: Path = ROOT, *, imported: Sequence[str] = (), held: Sequence[str] = ()) -> None:
        self.project = project
        self._files = [streams / name for name in ("output", "errors")]
        self._server = subprocess.Popen(
            [*held, sys.executable, str(project / "tests" / "support" / "forks.py"), *imported],
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
        for file in self._files:
            file.write_text("")
        streams = [os.devnull, *map(str, self._files)]
        given = self._request(script, arguments, folder, environment, streams)
        statuses: list[int] = self.ask("together", processes=processes, **given)
        return Ended(statuses, *(file.read_text() for file in self._files))

    def start(
        self,
        script: str | Path,
        *arguments: str,
        streams: Sequence[str | Path | None],
        folder: Path | None = None,
        environment: Mapping[str, str] | None = None,
        session: bool = False,
        ignoring: Sequence[int] = (),
    ) -> Started:
        """A script that runs beside the test, in a process group of its own, as a terminal gives it.

        streams: what it reads, prints and says in errors: files, terminals, pipes with a name; None for a closed one. session:
        it is alone with its terminal, if it has one. ignoring: signals that whoever starts it has told it to ignore.
        """
        named = [None if stream is None else str(stream) for stream in streams]
        given = self._request(script, arguments, folder, environment, named)
        return Started(self, self.ask("start", session=session, ignoring=list(map(int, ignoring)), **given))

    def _request(
        self,
        script: str | Path,
        arguments: Sequence[str],
        folder: Path | None,
        environment: Mapping[str, str] | None,
        streams: Sequence[str | None],
    ) -> dict[str, Any]:
        return {
            "script": str(self.project / script),
            "arguments": arguments,
            "folder": str(folder or self.project),
            "environment": {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
            "streams": streams,
        }

    def ask(self, what: str, **request: Any) -> Any:
        """What one of the functions below answers."""
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps({"what": what} | request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

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
        for child in set(children) - set(statuses):
            if (status := ended({"pid": child})) is not None:
                statuses[child] = status
                if status and ended_badly is None:
                    ended_badly = time.monotonic()
        if ended_badly is not None and time.monotonic() - ended_badly > PATIENCE_SECONDS:
            for other in set(children) - set(statuses):
                os.kill(other, signal.SIGTERM)
            ended_badly = math.inf
        time.sleep(0.02)
    del store
    return [statuses[child] for child in children]


def start(request: dict[str, Any]) -> int:
    """The number of a process that runs the script."""
    child = os.fork()
    if not child:
        os.setsid() if request["session"] else os.setpgid(0, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        for number in request["ignoring"]:
            signal.signal(number, signal.SIG_IGN)
        os._exit(run(request, {}))
    if not request["session"]:
        os.setpgid(child, child)  # whoever is first: the group is there when this returns
    STARTED.add(child)
    return child


def ended(request: dict[str, Any]) -> int | None:
    """The status of a started process; None while it runs."""
    child, status = os.waitpid(request["pid"], os.WNOHANG)
    STARTED.discard(child)
    return os.waitstatus_to_exitcode(status) if child else None


def run(request: dict[str, Any], meeting: dict[str, str]) -> int:
    """The script, in this process; its status."""
    os.environ.clear()
    os.environ.update(request["environment"] | meeting)
    os.chdir(request["folder"])
    opened = dict[tuple[str, int], int]()  # once each: who opens a pipe a second time waits for another reader
    for descriptor, (name, file) in enumerate(zip(("stdin", "stdout", "stderr"), request["streams"], strict=True)):
        if file is not None:
            how = file, os.O_WRONLY | os.O_APPEND if descriptor else os.O_RDONLY
            if how not in opened:
                opened[how] = os.open(*how)
            os.dup2(opened[how], descriptor)
        else:  # as Python begins with a closed one
            setattr(sys, name, None)
            setattr(sys, f"__{name}__", None)
    closed = [descriptor for descriptor, file in enumerate(request["streams"]) if file is None]
    for descriptor in (*opened.values(), *closed):
        os.close(descriptor)
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
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()


def main() -> None:
    sys.path[0] = str(ROOT)
    os.environ["WANDB_ERROR_REPORTING"] = "false"  # its client asks when it is imported; each command has its own
    for module in (*IMPORTED, *sys.argv[1:]):
        importlib.import_module(module)
    composing = importlib.import_module("harness.config.compose")
    composing.compose("train", [])  # Hydra looks for its plugins and learns its grammar: a tenth of a short training
    composing._composed.cache_clear()  # the files may be others by then
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps({"together": together, "start": start, "ended": ended}[request["what"]](request)), flush=True)
    for child in STARTED:
        os.killpg(child, signal.SIGKILL)


if __name__ == "__main__":
    main()
