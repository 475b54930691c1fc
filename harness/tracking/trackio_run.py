"""trackio: a dashboard on this machine for people without an account, one SQLite file per project in TRACKIO_DIR.

Its storage is written directly. trackio.init would ask the Hugging Face hub for the user's name, obey variables that
send a run to a server or make a Space, and sample the machine in threads of its own; the storage does none of that.
A run is known by its folder, and each time it is opened its rows are taken anew from metrics.jsonl, so that a run that
was resumed, evaluated or trained without trackio stands there as its folder has it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness.errors import tell
from harness.files.metrics import read_metrics
from harness.tracking.dashboard import FAILURES, DashboardError, RunDescription, Table, command_of, library

# Variables that make trackio's storage fetch or push something. TRACKIO_DIR, _STORAGE_MODE and _SQLITE_* are the user's.
_REMOTE = ("TRACKIO_BUCKET_ID", "TRACKIO_DATASET_ID", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "SPACE_REPO_NAME")

# A write costs about 3 ms, so rows that come faster wait for each other this long.
_SECONDS_BETWEEN_WRITES = 1.0


def open_trackio(described: RunDescription, *, run_dir: Path, anew: bool) -> TrackioRun | None:
    """The run of this folder, its rows as in metrics.jsonl; None, with one line said, when trackio cannot be used.

    anew: the final figures of an earlier run in the same folder are forgotten.
    """
    try:
        return TrackioRun(described, run_dir=run_dir, anew=anew)
    except FAILURES as error:
        tell(f"trackio: not in use ({error}); this run is recorded in {run_dir} alone")
        return None


class TrackioRun:
    """One run in trackio's storage (a harness.tracking.dashboard.Dashboard).

    The storage waits at most 10 seconds for its lock file and 30 for SQLite's; then it raises, and the mirroring ends.
    """

    label = "trackio"
    run_id: str | None = None  # W&B's, which trackio does not need
    is_online = False

    def __init__(self, described: RunDescription, *, run_dir: Path, anew: bool) -> None:
        self._project, self._name = described.project, described.name
        self._id = hashlib.sha256(os.fsencode(run_dir.resolve())).hexdigest()[:16]
        self._lines = 0  # of metrics.jsonl that are mirrored or wait to be
        self._last: dict[str, Any] = {"step": 0, "tokens": 0}
        self._waiting: list[Mapping[str, Any]] = []
        self._written_at = 0.0
        self._gave_up = False
        with _local():
            from trackio import utils
            from trackio.sqlite_storage import SQLiteStorage

            self._storage: Any = SQLiteStorage
            if utils.get_storage_mode() == "jsonl":
                raise DashboardError(
                    f"{utils.TRACKIO_DIR} is on a network file system, which its database does not survive; set "
                    f"TRACKIO_DIR to a folder of this machine"
                )
            self._storage.validate_project_name(self._project)
            known = {"run": self._name, "run_id": self._id}
            before = self._storage.get_run_config(self._project, **known) or {}
            times = {row["step"]: row["timestamp"] for row in self._storage.get_logs(self._project, **known)}
            self._storage.delete_run(self._project, **known)
        self._summary: dict[str, Any] = {} if anew else before.get("summary") or {}
        created = before.get("_Created") or _now()
        # An evaluation knows less of a run than its training did.
        self._config = (
            ({} if anew else before)
            | _flat(described.config)
            | {
                "_Group": described.group,
                "_Username": None,
                "_Created": _now() if anew else created,
                "job_type": described.job_type,
                "tags": ", ".join(described.tags),
                "notes": described.notes,
            }
        )
        rows = read_metrics(run_dir)
        if rows:
            now = _now()
            self._write(rows, [times.get(row["step"], now) for row in rows])

    def log(self, row: Mapping[str, float], step: int) -> None:
        self._waiting.append(row)
        if time.monotonic() - self._written_at >= _SECONDS_BETWEEN_WRITES:
            self._flush()

    def summary(self, values: Mapping[str, Any]) -> None:
        self._summary |= values

    def table(self, key: str, table: Table) -> None:
        data = [list(row) for row in table.rows]
        with _local():
            import trackio

            shown = trackio.Table(columns=list(table.columns), data=data)._to_dict(self._project, self._name)
        self._media({key: shown})

    def scatter(self, key: str, table: Table, *, x: str, y: str, title: str) -> None:
        """trackio has no chart of a table; whoever logs one logs its picture too."""

    def image(self, key: str, path: Path, caption: str) -> None:
        self._file(key, lambda trackio: trackio.Image(path, caption=caption))

    def page(self, key: str, path: Path) -> None:
        text = path.read_text(encoding="utf-8")
        self._file(key, lambda trackio: trackio.Html(text, inject=False))

    def give_up(self) -> None:
        self._gave_up = True

    def close(self, exit_code: int) -> bool:
        """Writes what waits and the final figures, and says how to look at them."""
        if self._gave_up:
            return False
        try:
            self._flush()
            if self._summary:
                # Figures of an evaluation (eval/corpus/split/loss) are charts of one point; the rest is configuration.
                figures = {key: value for key, value in self._summary.items() if "/" in key and isinstance(value, (int, float))}
                self._write([self._last | figures], [_now()], numbered=False)
        except DashboardError as error:
            tell(f"{self.label}: did not finish cleanly ({error}); metrics.jsonl is whole")
            return False
        command = shlex.join([*command_of("trackio", "trackio.cli"), "show", "--project", self._project])
        tell(f"{self.label}: {self._name}: look at it with: {command}")
        return True

    def _file(self, key: str, of: Callable[[Any], Any]) -> None:
        with _local():
            import trackio

            media = of(trackio)
            media._save(self._project, self._name)
            shown = media._to_dict()
        self._media({key: shown})

    def _media(self, values: dict[str, Any]) -> None:
        self._write([self._last | values], [_now()], numbered=False)

    def _flush(self) -> None:
        rows, self._waiting = self._waiting, []
        if rows:
            self._write(rows, [_now()] * len(rows))

    def _write(self, rows: Sequence[Mapping[str, Any]], times: Sequence[str], *, numbered: bool = True) -> None:
        """Into the database. A line of metrics.jsonl has a number, so that it can never stand there twice."""
        self._last = {key: rows[-1][key] for key in ("step", "tokens")}
        ids = [f"{self._id}:{self._lines + number}" if numbered else None for number in range(len(rows))]
        metrics, steps = (
            [{key: value for key, value in row.items() if key != "step"} for row in rows],
            [row["step"] for row in rows],
        )
        with _local():
            self._storage.bulk_log(
                project=self._project,
                run=self._name,
                run_id=self._id,
                log_ids=ids,
                timestamps=list(times),
                metrics_list=metrics,
                steps=steps,
                config=self._config | {"summary": self._summary},
            )
        self._lines += len(rows) if numbered else 0
        self._written_at = time.monotonic()


@contextlib.contextmanager
def _local() -> Iterator[None]:
    """Around calls of the library: nothing leaves this machine or is printed on standard output, which belongs to results."""
    kept = {key: os.environ.pop(key) for key in _REMOTE if key in os.environ}
    try:
        with library(), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        os.environ.update(kept)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """attention.name and the like: trackio's dashboard groups runs by keys of one level."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def _now() -> str:
    return datetime.now(UTC).isoformat()
