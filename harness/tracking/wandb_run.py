"""Weights & Biases: a run online if there is a key and the server answers, else offline, else not at all."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.tracking.dashboard import RunDescription, Table, first_line, program, say, without_repeats

# How long W&B may hold up a run, in seconds. WANDB_INIT_TIMEOUT and WANDB_FINISH_TIMEOUT override them.
# The client's own default is to wait for its server without end when a run finishes.
_LIMITS = {"init_timeout": 20.0, "finish_timeout": 60.0}

# Where lower is better the summary keeps the best value: `val/loss.min`.
_LOWER_IS_BETTER = ("val/loss", "val/perplexity", "val/bits_per_byte")


def open_wandb(described: RunDescription, *, run_dir: Path, run_id: str | None) -> WandbRun | None:
    """Starts a W&B run, or continues the one called run_id; None when there is to be none or none could be started."""
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
    run = WandbRun(run_dir, run_id, options)
    return run if run.is_open else None


class WandbRun:
    """One run of the W&B client (a harness.tracking.dashboard.Dashboard). What goes wrong in starting it is said."""

    label = "wandb"

    def __init__(self, run_dir: Path, run_id: str | None, options: Mapping[str, Any]) -> None:
        root = Path(os.environ.get("WANDB_DIR") or run_dir).absolute()
        self._alone = root == run_dir.absolute()  # <root>/wandb holds nothing but fragments of this run
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
        os.environ.update({key: wanted[key] for key in self._borrowed})
        try:
            import wandb

            self._wandb = wandb
            root.mkdir(parents=True, exist_ok=True)
            self._run = self._start({"dir": str(root), "reinit": "create_new", **options}, run_id)
        except Exception as error:
            say(self.label, f"not in use ({first_line(error)}); this run is recorded in metrics.jsonl alone")
        finally:
            if self._run is None:
                self._leave()
        self.run_id: str | None = self._run.id if self._run is not None else None

    @property
    def is_open(self) -> bool:
        return self._run is not None

    def _start(self, options: dict[str, Any], continued: str | None) -> Any:
        options |= {"id": continued, "resume": "allow"} if continued else {"id": secrets.token_hex(4)}
        # A variable that the client refuses is refused here, where no thread of its own runs yet that it would not end.
        self._wandb.Settings().update_from_env_vars(dict(os.environ))
        mode = self._set_up({}).mode
        if mode == "disabled":
            return None
        if mode in ("offline", "dryrun"):
            reason = "as WANDB_MODE or its settings say"
        else:
            try:
                if self._wandb.login(prompt=False, verify=False):
                    run = self._wandb.init(**options)
                    say(self.label, run.url)
                    return _with_metrics(run)
                reason = "there is no API key"
            except Exception as error:
                reason = first_line(error)
                self._wandb.teardown()
        self._set_up({"mode": "offline"})
        run = _with_metrics(self._wandb.init(**options))
        if continued and _summary_file(run).exists():
            # Each fragment of an offline run brings its own summary when it is uploaded, and the last one stays.
            run.summary.update(json.loads(_summary_file(run).read_text()))
        folder = Path(run.settings.sync_dir)
        say(
            self.label,
            f"offline ({reason}); upload with: {_sync_command(folder.parent if self._alone else folder)}",
        )
        return run

    def _set_up(self, extra: Mapping[str, Any]) -> Any:
        """The client's settings, from the environment, the user's files and `extra`; silent, and bounded in time."""
        known = self._wandb.Settings.model_fields
        limits: dict[str, Any] = {
            key: seconds for key, seconds in _LIMITS.items()
            if key in known and f"WANDB_{key.upper()}" not in os.environ
        }  # fmt: skip
        if "finish_timeout_raises" in known:
            limits["finish_timeout_raises"] = True
        settings = self._wandb.Settings(silent=True, console="off", symlink=False, **limits, **extra)
        return self._wandb.setup(settings).settings

    def log(self, row: Mapping[str, float], step: int) -> None:
        # Rows of one step are one row in W&B, open until the next step. Steps that its server has already, because the
        # run got further before it was killed, are left out there.
        self._run.log(dict(row), step=step)
        self._row_is_open = True

    def summary(self, values: Mapping[str, Any]) -> None:
        self._run.summary.update(dict(values))

    def table(self, key: str, table: Table) -> None:
        self._run.log({key: self._table(table)})

    def scatter(self, key: str, table: Table, *, x: str, y: str) -> None:
        title = f"{y} against {x}"
        self._run.log({key: self._wandb.plot.scatter(self._table(table), x, y, title=title)})

    def image(self, key: str, path: Path, caption: str) -> None:
        self._run.log({key: self._wandb.Image(str(path), caption=caption)})

    def page(self, key: str, path: Path) -> None:
        # Anything that is no file the client would take for the page itself. inject adds its own style sheet.
        self._run.log({key: self._wandb.Html(path.read_text(encoding="utf-8"), inject=False, data_is_not_path=True)})

    def _table(self, table: Table) -> Any:
        rows = [list(row) for row in table.rows]
        return self._wandb.Table(columns=list(table.columns), data=rows, allow_mixed_types=True)

    def give_up(self) -> None:
        self._gave_up = True

    def close(self, exit_code: int) -> None:
        """Waits until the server has everything, within the limit, and ends the client."""
        run, self._run = self._run, None
        try:
            if self._gave_up:
                # What had arrived stays, and no thread of the client's does. Why the rest is missing has been said.
                with contextlib.suppress(Exception):
                    run.finish(exit_code=exit_code)
            elif run is not None:
                if self._row_is_open:
                    run.log({}, commit=True)
                summary = {key: run.summary[key] for key in run.summary.keys() if not key.startswith("_")}  # noqa: SIM118
                _summary_file(run).write_text(json.dumps(summary, default=dict))
                run.finish(exit_code=exit_code)
        except TimeoutError:
            command = _sync_command(Path(run.settings.sync_dir), "--include-online")
            say(self.label, f"the server did not take everything in time; upload the rest with: {command}")
        except Exception as error:
            say(self.label, f"did not finish cleanly ({first_line(error)}); metrics.jsonl is whole")
        finally:
            self._leave()

    def _leave(self) -> None:
        """Ends the client's service process and gives the environment back: the next run starts from nothing."""
        # A service that ended badly makes the client leave the interpreter; whatever was lost has been said by now.
        with contextlib.suppress(Exception, SystemExit):
            if self._wandb is not None:
                self._wandb.teardown()
        for key in self._borrowed:
            os.environ.pop(key, None)


def _with_metrics(run: Any) -> Any:
    run.define_metric("tokens")
    run.define_metric("*", step_metric="tokens")
    for key in _LOWER_IS_BETTER:
        run.define_metric(key, step_metric="tokens", summary="min")
    return run


def _summary_file(run: Any) -> Path:
    return Path(run.settings.sync_dir).parent / f"summary-{run.id}.json"


def _sync_command(folder: Path, *options: str) -> str:
    shown = os.path.relpath(folder) if folder.is_relative_to(Path.cwd()) else str(folder)
    return shlex.join([*program("wandb", "wandb"), "sync", *options, shown])
