"""What a run logs to: metrics.jsonl, the record of a run, and a dashboard that mirrors it.

The dashboard may fail in any way (no package, no key, no server, a server that falls silent, a locked database) without
harming the run or holding it up for longer than a minute or so.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from harness.config.schema import TrackingConfig
from harness.errors import UserError, tell
from harness.files.folders import refuse_links
from harness.files.metrics import MetricsFile, read_metrics
from harness.tracking.dashboard import FAILURES, Dashboard, RunDescription, Table, without_repeats
from harness.tracking.wandb_run import RUN_ID, open_wandb


def check_tracking(config: TrackingConfig) -> None:
    """Raises UserError if this tracking needs a package that is not installed. W&B is part of requirements.txt."""
    # A folder of the same name without an __init__.py counts as a package to Python: it has no origin.
    spec = importlib.util.find_spec("trackio") if config.name == "trackio" else None
    if config.name == "trackio" and (spec is None or spec.origin is None):
        raise UserError(
            "tracking=trackio needs the package trackio: pip install -r requirements-extra.txt, or take tracking=wandb "
            "or tracking=none"
        )


def open_tracker(
    config: TrackingConfig,
    *,
    run_dir: Path,
    name: str,
    run_config: Mapping[str, Any],
    group: str,
    job_type: str,
    tags: Sequence[str],
    run_id: str | None = None,
    metrics_bytes: int | None = None,
    online: bool = False,
) -> Tracker:
    """Starts or continues the tracking of a run.

    run_config: nested plain values, shown as the run's configuration. group and tags: added to by `config`; for W&B,
    WANDB_PROJECT, _ENTITY, _RUN_GROUP, _NAME, _TAGS, _NOTES, _MODE, _DIR and _BASE_URL in the environment come first.
    run_id: the W&B run to continue, None for the one that run_dir keeps in its file wandb_id, a new one at first; whoever
    continues a run passes the run's own name, group, job_type and tags again. A run in trackio is known by its folder.
    metrics_bytes: metrics.jsonl is cut to this size (0: a new run) and appended to; None leaves it untouched, so that an
    evaluation cannot disturb a run that will be resumed. online: W&B's server or nothing.

    At most one tracker is open at a time; commands have called check_tracking before their work. Raises UserError if
    metrics.jsonl or wandb/ leads elsewhere, if run_id is no such name, and with online if the server cannot be used.
    """
    if run_id is not None and not (isinstance(run_id, str) and RUN_ID.fullmatch(run_id)):
        raise UserError(f"{run_dir} names {run_id} as its W&B run, which is no such name: train anew with overwrite=true")
    refuse_links(run_dir, ("metrics.jsonl", "wandb"))
    metrics = None if metrics_bytes is None else MetricsFile(run_dir / "metrics.jsonl", metrics_bytes)
    described = RunDescription(
        project=config.project,
        entity=config.entity,
        group=config.group or group,
        name=name,
        notes=config.notes,
        tags=without_repeats([*config.tags, *tags]),
        job_type=job_type,
        config=run_config,
    )
    dashboard: Dashboard | None = None
    if config.name == "wandb":
        dashboard = open_wandb(described, run_dir=run_dir, run_id=run_id, online=online)
    elif config.name == "trackio":
        from harness.tracking.trackio_run import open_trackio

        dashboard = open_trackio(described, run_dir=run_dir, anew=metrics_bytes == 0)
    else:
        assert config.name == "none", config.name
    tracker = Tracker(metrics, dashboard, (dashboard.run_id if dashboard is not None else None) or run_id)
    if config.name == "wandb" and metrics_bytes:
        tracker.catch_up(run_dir)
    return tracker


def log_study(
    config: TrackingConfig,
    *,
    study: str,
    folder: Path,
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    images: Mapping[str, Path],
    html: Path,
    scatter: tuple[str, str],
) -> None:
    """A study's results as one run of the dashboard, named after the study, with job type "study".

    It holds the table `results`, the pictures under their names (PNG files), the page `report` (an .html file), and a chart
    of the columns scatter=(of x, of y) of the table in which points can be looked at: W&B only, trackio has no such chart and
    shows the pictures. Called again for the same folder it adds to the same run: W&B shows
    the newest, trackio keeps the newest. A file that is missing ends the mirroring with one line; nothing is
    raised. tracking=none: does nothing.
    """
    if config.name == "none":
        return
    with open_tracker(
        config, run_dir=folder, name=study, run_config={"study": study}, group=study, job_type="study", tags=[study]
    ) as tracker:

        def show(dashboard: Dashboard) -> None:
            table = Table(columns, rows)
            dashboard.table("results", table)
            x, y = scatter
            dashboard.scatter("scatter", table, x=x, y=y, title=f"{y} against {x}")
            for key, path in images.items():
                dashboard.image(key, path, caption=key)
            dashboard.page("report", html)

        tracker.mirror(show)


class Tracker:
    """What a run logs to. `run_id` is W&B's name for the run (None if it has none): store it to continue the run."""

    def __init__(self, metrics: MetricsFile | None, dashboard: Dashboard | None, run_id: str | None) -> None:
        self._metrics, self._dashboard, self.run_id = metrics, dashboard, run_id
        self._mirrors = dashboard is not None
        self.arrived = True  # once closed: whether the dashboard has everything, or a later upload will find it

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close(exit_code=0 if kind is None else 1)

    @property
    def metrics_bytes(self) -> int:
        """Size of metrics.jsonl, all of it safe on disk: a checkpoint with this number can be resumed from."""
        assert self._metrics is not None, "opened with metrics_bytes=None"
        return self._metrics.size()

    def log(self, step: int, tokens: int, metrics: Mapping[str, float]) -> None:
        """One line of metrics.jsonl and one row in the dashboard. tokens: seen so far, the x-axis of every chart."""
        assert self._metrics is not None, "opened with metrics_bytes=None"
        row = {"step": step, "tokens": tokens, **metrics}
        self._metrics.append(row)
        self.mirror(lambda dashboard: dashboard.log(row, step))

    def catch_up(self, run: Path) -> None:
        """Rows of metrics.jsonl that a dashboard online has not, because a process was killed before they were sent."""

        def send(dashboard: Dashboard) -> None:
            if dashboard.is_online:
                for row in read_metrics(run):
                    values = {key: math.nan if value is None else value for key, value in row.items()}
                    dashboard.log(values, row["step"])

        self.mirror(send)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Final figures in the dashboard; keys that are there already are replaced, the others stay."""
        self.mirror(lambda dashboard: dashboard.summary(dict(values)))

    def check(self) -> None:
        """Raises UserError when the run's folder is no longer there to take what is written."""
        if self._metrics is not None:
            self._metrics.check()

    def close(self, exit_code: int = 0) -> None:
        """Ends the tracking; exit_code 0 marks the run as finished in W&B, any other as failed. May be called twice."""
        if self._metrics is not None:
            self._metrics.close()
        if self._dashboard is not None:
            self.arrived = self._dashboard.close(exit_code) and self._mirrors
            self._dashboard = None

    def mirror(self, send: Callable[[Dashboard], None]) -> None:
        """Tell the dashboard, if there is one.

        The first failure of its library, or of a file, ends the mirroring: hours of training must not end because of it.
        """
        if self._dashboard is None or not self._mirrors:
            return
        try:
            send(self._dashboard)
        except FAILURES as error:
            kept = "this run goes on and is recorded in metrics.jsonl alone" if self._metrics else "the files are whole"
            tell(f"{self._dashboard.label}: stopped ({str(error).rstrip('.')}); {kept}")
            self._mirrors = False
            self._dashboard.give_up()


class SilentTracker(Tracker):
    """Of a process that trains along and leaves the record to another one."""

    def __init__(self) -> None:
        super().__init__(None, None, None)

    @property
    def metrics_bytes(self) -> int:
        return 0

    def log(self, step: int, tokens: int, metrics: Mapping[str, float]) -> None:
        pass
