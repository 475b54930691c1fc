"""Weights & Biases: a run online if there is a key and the server answers, else offline, else not at all."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import re
import secrets
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.errors import UserError, tell
from harness.files.atomic import write_text
from harness.tracking.dashboard import FAILURES, DashboardError, RunDescription, Table, command_of, library, without_repeats

RUN_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")  # it becomes part of the names of files
ID_FILE = "wandb_id"  # in a run's folder
UNSENT = "unsent"  # in the client's folder of an online run that its server did not take whole
SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "sync_wandb.py"

# How long W&B may hold up a run, in seconds. WANDB_INIT_TIMEOUT and WANDB_FINISH_TIMEOUT override them.
# The client's own default is to wait for its server without end when a run finishes.
_LIMITS = {"init_timeout": 20.0, "finish_timeout": 60.0}


def open_wandb(described: RunDescription, *, run_dir: Path, run_id: str | None, online: bool = False) -> WandbRun | None:
    """Starts a W&B run, or continues the one called run_id or kept in the folder; None when there is to be none or none
    could be started.

    online: whatever WANDB_MODE says; a UserError where the server cannot be used.
    """
    environment = os.environ
    options = {
        "project": environment.get("WANDB_PROJECT") or described.project,
        "entity": environment.get("WANDB_ENTITY") or described.entity,
        "group": environment.get("WANDB_RUN_GROUP") or described.group,
        "name": environment.get("WANDB_NAME") or described.name,
        "notes": environment.get("WANDB_NOTES") or described.notes,
        "tags": without_repeats([*environment.get("WANDB_TAGS", "").split(","), *described.tags]),
        "job_type": described.job_type,
        "config": dict(described.config),
    }
    run = WandbRun(run_dir, run_id, options, online=online)
    return run if run.is_open else None


def client_root(run_dir: Path) -> Path:
    """The folder in which the client makes its folder wandb/."""
    return Path(os.environ.get("WANDB_DIR") or run_dir).absolute()


def kept_id(folder: Path) -> str | None:
    """The W&B run of this folder; None if it has none yet."""
    with contextlib.suppress(OSError, ValueError):
        kept = (folder / ID_FILE).read_text(encoding="utf-8").strip() if (folder / ID_FILE).is_file() else ""
        return kept if RUN_ID.fullmatch(kept) else None
    return None


def _new_id(folder: Path) -> str:
    """Kept before anything is sent: whatever kills this process, the next one continues the same run.

    A folder that cannot be written gets a new run each time.
    """
    new = secrets.token_hex(4)
    with contextlib.suppress(OSError):
        write_text(folder / ID_FILE, f"{new}\n")
    return new


def _wait_for_a_folder_of_its_own(clients: Path, run_id: str) -> None:
    """Waits up to a second. The client names its folder by the run and the time in seconds, so two short commands on one run
    in the same second would share a folder, and what the first one tracked would be lost.
    """
    while any(clients.glob(f"*run-{time.strftime('%Y%m%d_%H%M%S')}-{glob.escape(run_id)}")):
        time.sleep(0.02)


class WandbRun:
    """One run of the W&B client (a harness.tracking.dashboard.Dashboard). What goes wrong in starting it is said."""

    label = "wandb"

    def __init__(self, run_dir: Path, run_id: str | None, options: Mapping[str, Any], *, online: bool = False) -> None:
        root = client_root(run_dir)
        self._folder, self._online = run_dir, online
        self._wandb: Any = None
        self._run: Any = None
        self._row_is_open = False
        self._gave_up = False
        # The client's caches lie in the home folder by default. Its reports on itself need threads that outlive a run.
        wanted = {
            "WANDB_CACHE_DIR": str(root / "wandb" / "cache"),
            "WANDB_DATA_DIR": str(root / "wandb" / "data"),
            "WANDB_ERROR_REPORTING": "false",
        }
        self._borrowed = [key for key in wanted if key not in os.environ]
        self._hooks = sys.exit, sys.excepthook
        os.environ.update({key: wanted[key] for key in self._borrowed})
        try:
            with library():
                import wandb

            self._wandb = wandb
            root.mkdir(parents=True, exist_ok=True)
            self._run = self._start({"dir": str(root), "reinit": "create_new", **options}, run_id)
        except FAILURES as error:
            if online:
                raise UserError(f"Weights & Biases cannot be used ({error}); nothing was changed") from None
            tell(f"{self.label}: not in use ({error}); this run is recorded in metrics.jsonl alone")
        finally:
            if self._run is None:
                self._leave()
        self.run_id: str | None = self._run.id if self._run is not None else None
        self.is_online = self._run is not None and not self._run.offline

    @property
    def is_open(self) -> bool:
        return self._run is not None

    def _start(self, options: dict[str, Any], continued: str | None) -> Any:
        # A variable that the client refuses is refused here, where no thread of its own runs yet that it would not end.
        with library():
            self._wandb.Settings().update_from_env_vars(dict(os.environ))
        mode = self._set_up({"mode": "online"} if self._online else {}).mode
        if mode == "disabled":
            return None
        options |= {"id": continued or kept_id(self._folder) or _new_id(self._folder), "resume": "allow"}
        _wait_for_a_folder_of_its_own(Path(options["dir"]) / "wandb", options["id"])
        if mode in ("offline", "dryrun"):
            reason = "as WANDB_MODE or its settings say"
        else:
            reason = "there is no API key"
            try:
                with library():
                    run = self._wandb.init(**options) if self._wandb.login(prompt=False, verify=False) else None
                if run is not None:
                    tell(f"{self.label}: {run.url}")
                    return _with_metrics(run)
            except DashboardError as error:
                reason = str(error)
                with library():
                    self._wandb.teardown()
        if self._online:
            raise DashboardError(reason)
        self._set_up({"mode": "offline"})
        with library():
            run = self._wandb.init(**options)
        _with_metrics(run)
        tell(f"{self.label}: offline ({reason}); upload with: {sync_command(self._folder)}")
        return run

    def _set_up(self, extra: Mapping[str, Any]) -> Any:
        """The client's settings, from the environment, the user's files and `extra`; silent, and bounded in time."""
        with library():
            known = self._wandb.Settings.model_fields
        limits: dict[str, Any] = {
            key: seconds for key, seconds in _LIMITS.items() if key in known and f"WANDB_{key.upper()}" not in os.environ
        }
        if "finish_timeout_raises" in known:
            limits["finish_timeout_raises"] = True
        with library():
            settings = self._wandb.Settings(silent=True, console="off", symlink=False, **limits, **extra)
            return self._wandb.setup(settings).settings

    def log(self, row: Mapping[str, float], step: int) -> None:
        # Rows of one step are one row in W&B, open until the next step. Steps that its server has already, because the
        # run got further before it was killed, stay as they are there.
        if step >= self._run.starting_step:
            with library():
                self._run.log(dict(row), step=step)
            self._row_is_open = True

    def summary(self, values: Mapping[str, Any]) -> None:
        with library():
            self._run.summary.update(dict(values))

    def table(self, key: str, table: Table) -> None:
        shown = self._table(table)
        with library():
            self._run.log({key: shown})

    def scatter(self, key: str, table: Table, *, x: str, y: str, title: str) -> None:
        shown = self._table(table)
        with library():
            self._run.log({key: self._wandb.plot.scatter(shown, x, y, title=title)})

    def image(self, key: str, path: Path, caption: str) -> None:
        with library():
            self._run.log({key: self._wandb.Image(str(path), caption=caption)})

    def page(self, key: str, path: Path) -> None:
        # Anything that is no file the client would take for the page itself. inject adds its own style sheet.
        page = path.read_text(encoding="utf-8")
        with library():
            self._run.log({key: self._wandb.Html(page, inject=False, data_is_not_path=True)})

    def _table(self, table: Table) -> Any:
        rows = [list(row) for row in table.rows]
        with library():
            return self._wandb.Table(columns=list(table.columns), data=rows, allow_mixed_types=True)

    def give_up(self) -> None:
        self._gave_up = True

    def close(self, exit_code: int) -> bool:
        """Waits until the server has everything, within the limit, and ends the client. Whether it has, or the disk."""
        run, self._run = self._run, None
        if run is None:
            return True
        whole = False
        try:
            if self._gave_up:
                # What had arrived stays, and no thread of the client's does. Why the rest is missing has been said.
                with contextlib.suppress(Exception):
                    run.finish(exit_code=exit_code)
            else:
                with library():
                    if self._row_is_open:
                        run.log({}, commit=True)
                    run.finish(exit_code=exit_code)
                refusal = _refusal(Path(run.settings.log_internal))
                whole = refusal is None
                if refusal is not None:
                    tell(
                        f"{self.label}: the server refused what was sent (status {refusal}), and rows stayed on this machine; "
                        f"with a key and a project that it takes, upload them with: {sync_command(self._folder)}"
                    )
        except DashboardError as error:
            said = f"did not finish cleanly ({error}); metrics.jsonl is whole"
            if isinstance(error.__cause__, TimeoutError):
                said = f"the server did not take everything in time; upload the rest with: {sync_command(self._folder)}"
            tell(f"{self.label}: {said}")
        finally:
            if not whole:
                with contextlib.suppress(OSError):
                    (Path(run.settings.sync_dir) / UNSENT).touch()
            self._leave()
        return whole

    def _leave(self) -> None:
        """Ends the client's service process, gives environment and hooks back: the next run starts from nothing."""
        # A service that ended badly makes the client leave the interpreter; whatever was lost has been said by now.
        with contextlib.suppress(Exception, SystemExit):
            if self._wandb is not None:
                self._wandb.teardown()
        for key in self._borrowed:
            os.environ.pop(key, None)
        sys.exit, sys.excepthook = self._hooks  # else every run of a process adds its own, which prints a traceback once more


def _refusal(log: Path) -> int | None:
    """The status with which the server refused rows of a run, which the client says nowhere but in its log of JSON lines."""
    with contextlib.suppress(OSError):
        for line in log.read_bytes().splitlines():
            with contextlib.suppress(ValueError, AttributeError):
                status = (entry := json.loads(line)).get("status")
                if status in (401, 403) or (status in (404, 410) and str(entry.get("url")).endswith("/file_stream")):
                    return int(status)
    return None


def _with_metrics(run: Any) -> Any:
    # The summary keeps the last value of each, whatever the run has been through.
    with library():
        run.define_metric("tokens")
        run.define_metric("*", step_metric="tokens")
    return run


def sync_command(folder: Path) -> str:
    """What a person types to upload what W&B lacks of a folder."""
    here = Path.cwd()
    script, shown = (os.path.relpath(path) if path.is_relative_to(here) else str(path) for path in (SCRIPT, folder.absolute()))
    return shlex.join([*command_of("python", ""), script, shown])
