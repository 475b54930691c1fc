"""Run tracking: metrics.jsonl always, Weights & Biases beside it.

metrics.jsonl is the record of a run. W&B mirrors it and may fail in any way (no package, no key, no server, a server
that falls silent) without harming the run or holding it up for longer than `_LIMITS`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from harness.errors import UserError
from harness.schema import TrackingConfig

# How long W&B may hold up a run, in seconds. WANDB_INIT_TIMEOUT and WANDB_FINISH_TIMEOUT override them.
# The client's own default is to wait for its server without end when a run finishes.
_LIMITS = {"init_timeout": 20.0, "finish_timeout": 60.0}

# Where lower is better the summary keeps the best value: `val/loss.min`.
_LOWER_IS_BETTER = ("val/loss", "val/perplexity", "val/bits_per_byte")


def open_tracker(
    config: TrackingConfig,
    *,
    run_dir: Path,
    name: str,
    run_config: Mapping[str, Any],
    group: str,
    job_type: str,
    tags: Sequence[str],
    run_id: str | None,
    metrics_bytes: int | None,
) -> Tracker:
    """Starts or continues the tracking of a run.

    run_config: nested plain values, shown by W&B as the run's configuration. group and tags: added to by `config`;
    WANDB_PROJECT, _ENTITY, _RUN_GROUP, _NAME, _TAGS, _NOTES, _MODE, _DIR and _BASE_URL in the environment come first.
    run_id: the W&B run to continue, None for a new one; whoever continues a run passes the run's own name, group,
    job_type and tags again. metrics_bytes: metrics.jsonl is cut to this size (0: a new run) and appended to; None
    leaves it untouched, so that an evaluation cannot disturb a run that will be resumed.

    At most one tracker is open at a time. Raises UserError if metrics.jsonl is shorter than metrics_bytes.
    """
    metrics = None if metrics_bytes is None else _MetricsFile(run_dir / "metrics.jsonl", metrics_bytes)
    if config.name == "none":
        return Tracker(metrics, None, run_id)
    assert config.name == "wandb", config.name
    environment = os.environ
    dashboard = _Dashboard(
        run_dir,
        run_id,
        {
            "project": environment.get("WANDB_PROJECT") or config.project,
            "entity": environment.get("WANDB_ENTITY") or config.entity,
            "group": environment.get("WANDB_RUN_GROUP") or config.group or group,
            "name": environment.get("WANDB_NAME") or name,
            "notes": environment.get("WANDB_NOTES") or config.notes,
            "tags": _without_repeats([*environment.get("WANDB_TAGS", "").split(","), *config.tags, *tags]),
            "job_type": job_type,
            "config": dict(run_config),
        },
    )
    return Tracker(metrics, dashboard, dashboard.run_id or run_id)


class Tracker:
    """What a run logs to. `run_id` is W&B's name for the run (None if it has none): store it to continue the run."""

    def __init__(self, metrics: _MetricsFile | None, dashboard: _Dashboard | None, run_id: str | None) -> None:
        self._metrics, self._dashboard, self.run_id = metrics, dashboard, run_id
        self._row_is_open = False

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(exit_code=0 if kind is None else 1)

    @property
    def metrics_bytes(self) -> int:
        """Size of metrics.jsonl, all of it safe on disk: a checkpoint with this number can be resumed from."""
        assert self._metrics is not None, "opened with metrics_bytes=None"
        return self._metrics.size()

    def log(self, step: int, tokens: int, metrics: Mapping[str, float]) -> None:
        """One line of metrics.jsonl and one row in W&B. tokens: seen so far, the x-axis of every chart."""
        assert self._metrics is not None, "opened with metrics_bytes=None"
        row = {"step": step, "tokens": tokens, **metrics}
        self._metrics.append(row)
        # Rows of one step are one row in W&B, open until the next step. Steps that its server has already, because the
        # run got further before it was killed, are left out there.
        self._mirror(lambda run: run.log(row, step=step))
        self._row_is_open = True

    def summary(self, values: Mapping[str, Any]) -> None:
        """Final figures in W&B; keys that are there already are replaced, the others stay."""
        self._mirror(lambda run: run.summary.update(dict(values)))

    def log_table(self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table in W&B."""

        def send(run: Any) -> None:
            import wandb

            run.log({key: wandb.Table(columns=list(columns), data=[list(row) for row in rows])})

        self._mirror(send)

    def log_image(self, key: str, path: Path, caption: str) -> None:
        """A picture in W&B, from a PNG file."""

        def send(run: Any) -> None:
            import wandb

            run.log({key: wandb.Image(str(path), caption=caption)})

        self._mirror(send)

    def close(self, exit_code: int = 0) -> None:
        """Ends the tracking; exit_code 0 marks the run as finished in W&B, any other as failed. May be called twice."""
        if self._metrics is not None:
            self._metrics.close()
        if self._row_is_open:
            self._mirror(lambda run: run.log({}, commit=True))
        if self._dashboard is not None:
            self._dashboard.close(exit_code)
            self._dashboard = None

    def _mirror(self, send: Callable[[Any], None]) -> None:
        if self._dashboard is not None:
            self._dashboard.mirror(send)


class _MetricsFile:
    """metrics.jsonl: every line reaches the operating system at once, so that a killed process loses none."""

    def __init__(self, path: Path, keep_bytes: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        size = path.stat().st_size if path.exists() else 0
        if size < keep_bytes:
            raise UserError(
                f"{path} has {size} bytes, fewer than the {keep_bytes} it had at the checkpoint: put the file back, or "
                "train anew with overwrite=true"
            )
        self._file = path.open("ab")
        self._file.truncate(keep_bytes)

    def append(self, row: Mapping[str, float]) -> None:
        # JSON has no infinity and no NaN; readers other than Python's stop at them.
        finite = {key: value if math.isfinite(value) else None for key, value in row.items()}
        self._file.write(json.dumps(finite, allow_nan=False).encode() + b"\n")
        self._file.flush()

    def size(self) -> int:
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        self._file.close()


class _Dashboard:
    """One run of the W&B client: online if there is a key and the server answers, else offline, else not at all.

    Exceptions of any kind are caught here and nowhere else: hours of training must not end because of a dashboard.
    """

    def __init__(self, run_dir: Path, run_id: str | None, options: Mapping[str, Any]) -> None:
        root = Path(os.environ.get("WANDB_DIR") or run_dir).absolute()
        self._alone = root == run_dir.absolute()  # <root>/wandb holds nothing but fragments of this run
        self._wandb: Any = None
        self._run: Any = None
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
            _say(f"not in use ({_first_line(error)}); this run is recorded in metrics.jsonl alone")
        finally:
            if self._run is None:
                self._leave()
        self.run_id: str | None = self._run.id if self._run is not None else None

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
                    _say(run.url)
                    return _with_metrics(run)
                reason = "there is no API key"
            except Exception as error:
                reason = _first_line(error)
                self._wandb.teardown()
        self._set_up({"mode": "offline"})
        run = _with_metrics(self._wandb.init(**options))
        if continued and _summary_file(run).exists():
            # Each fragment of an offline run brings its own summary when it is uploaded, and the last one stays.
            run.summary.update(json.loads(_summary_file(run).read_text()))
        folder = Path(run.settings.sync_dir)
        _say(f"offline ({reason}); upload with: {_sync_command(folder.parent if self._alone else folder)}")
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

    def mirror(self, send: Callable[[Any], None]) -> None:
        """Does something with the W&B run. The first failure ends the mirroring, not the run."""
        if self._run is None:
            return
        try:
            send(self._run)
        except Exception as error:
            _say(f"stopped ({_first_line(error)}); this run goes on and is recorded in metrics.jsonl alone")
            self._run = None

    def close(self, exit_code: int) -> None:
        """Waits until the server has everything, within the limit, and ends the client."""
        run, self._run = self._run, None
        try:
            if run is not None:
                summary = {key: run.summary[key] for key in run.summary.keys() if not key.startswith("_")}  # noqa: SIM118
                _summary_file(run).write_text(json.dumps(summary, default=dict))
                run.finish(exit_code=exit_code)
        except TimeoutError:
            command = _sync_command(Path(run.settings.sync_dir), "--include-online")
            _say(f"the server did not take everything in time; upload the rest with: {command}")
        except Exception as error:
            _say(f"did not finish cleanly ({_first_line(error)}); metrics.jsonl is whole")
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


def _say(message: str) -> None:
    print(f"wandb: {message}", file=sys.stderr)


def _first_line(error: BaseException) -> str:
    if type(error).__name__ == "ValidationError" and callable(errors := getattr(error, "errors", None)):
        return _refused_setting(errors()[0])
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _refused_setting(details: Mapping[str, Any]) -> str:
    """A setting that the client does not accept and what it would, from pydantic, whose first line says neither."""
    name = ".".join(str(part) for part in details["loc"])
    variable = f"WANDB_{name.upper()}"
    # Of a setting with fixed choices the value is shown too: of others it may be an API key.
    value = f"={details['input']}" if details["type"] == "literal_error" else ""
    message = details["msg"][:1].lower() + details["msg"][1:]
    return f"{variable if variable in os.environ else name}{value}: {message.rstrip('.')}"


def _sync_command(folder: Path, *options: str) -> str:
    program = ["wandb"] if shutil.which("wandb") else [sys.executable, "-m", "wandb"]
    shown = os.path.relpath(folder) if folder.is_relative_to(Path.cwd()) else str(folder)
    return shlex.join([*program, "sync", *options, shown])


def _without_repeats(tags: Sequence[str]) -> list[str]:
    return [tag for tag in dict.fromkeys(tag.strip()[:64] for tag in tags) if tag]  # 64 is W&B's limit
