"""A run's folder brought into a dashboard, however it was tracked when it was trained: its files are the record."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from harness.config.run_config import load_run_config
from harness.config.schema import TrackingConfig
from harness.evaluation.facts import Facts
from harness.runs.folder import finished
from harness.runs.records import RunSummary, read_evaluations, read_metrics, read_summary
from harness.runs.score import dashboard_figures
from harness.runs.summary import open_run_tracker


def mirror(run: Path, tracking: TrackingConfig, *, run_id: str | None = None) -> bool:
    """Bring in what the dashboard lacks of a run: rows, final figures, evaluations. Whether all of it arrived.

    W&B is used online or not at all. Raises UserError when it cannot be, or for a file that cannot be read.
    """
    # What the keys of an evaluation's figures are made of, see harness/runs/score.py.
    summary: RunSummary = read_summary(run, "data_fingerprint", "cache_dtype") if finished(run) else {}
    config = load_run_config(run)
    facts = {key: value for key, value in summary.items() if key in Facts.__annotations__}
    by_wandb = tracking.name == "wandb"
    rows, evaluations = read_metrics(run), read_evaluations(run) if summary else []
    with open_run_tracker(
        config,
        tracking,
        run,
        run_config=dataclasses.asdict(config) | facts,
        metrics_bytes=None,
        online=by_wandb,
        run_id=run_id or summary.get("wandb_id"),
    ) as tracker:
        if by_wandb:  # trackio reads them itself
            tracker.catch_up(run / "metrics.jsonl")
            # The server has rows already whose values a later part's summary may have replaced.
            tracker.summary({key: value for row in rows for key, value in row.items() if "/" in key and value is not None})
        tracker.summary(summary)
        for record in evaluations:
            tracker.summary(dashboard_figures(record, summary))
    return tracker.arrived
