"""A run in a dashboard: its tracker, what is shown of an evaluation, and a folder brought in afterwards.

However a run was tracked when it was trained, its files are the record. No torch: an upload need not wait for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.config.identity import corpus_name
from harness.config.run_config import load_run_config
from harness.config.schema import TrackingConfig, TrainConfig
from harness.evaluation.metric import Facts, Scores
from harness.files.metrics import read_metrics
from harness.runs.evaluations import cache_label
from harness.runs.folder import finished
from harness.runs.kind import PROTOCOL, USUAL, kind_of
from harness.runs.records import RunSummary, read_evaluations, read_summary
from harness.tracking import Tracker, open_tracker


def mirror(run: Path, tracking: TrackingConfig, *, run_id: str | None = None) -> bool:
    """Bring in what the dashboard lacks of a run: rows, final figures, evaluations. Whether all of it arrived.

    W&B is used online or not at all. Raises UserError when it cannot be, or for a file that cannot be read.
    """
    # What the keys of an evaluation's figures are made of.
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
        online=by_wandb,
        run_id=run_id or summary.get("wandb_id"),
    ) as tracker:
        if by_wandb:  # trackio reads them itself
            tracker.catch_up(run)
            # The server has rows already whose values a later part's summary may have replaced.
            tracker.summary({key: value for row in rows for key, value in row.items() if "/" in key and value is not None})
        tracker.summary(summary)
        for record in evaluations:
            tracker.summary(dashboard_figures(record, summary))
    return tracker.arrived


def dashboard_figures(record: Mapping[str, Any], summary: Mapping[str, Any]) -> dict[str, Any]:
    """What a dashboard shows of an evaluation: eval/corpus/split/loss and so on.

    Whatever tells its file from that of a plain evaluation of the run's own corpus stands between: two evaluations never
    share a key. summary: of the run.
    """
    corpus, kind = str(record.get("corpus", record["dataset"])), kind_of(record)
    if record["data_fingerprint"] != summary["data_fingerprint"]:
        corpus += f"@{record['data_fingerprint'][:8]}"
    scoring = {name: getattr(kind, name) for name in PROTOCOL}
    unusual = {name: value for name, value in scoring.items() if value not in (None, USUAL.get(name))}
    apart = {
        **{name if value is True else f"{name}={value}": True for name, value in unusual.items()},
        str(record.get("precision")): record.get("precision") != summary.get("precision"),
        f"cache_dtype={kind.cache_dtype}": not kind.through_cache and kind.cache_dtype != summary["cache_dtype"],
        f"through {cache_label(record)}" if kind.through_cache else "": kind.through_cache,
    }
    place = "/".join(["eval", corpus, record["split"], *(name for name, applies in apart.items() if applies)])
    return {f"{place}/{key}": record[key] for key in Scores.__annotations__ if key in record}


def open_run_tracker(
    config: TrainConfig,
    tracking: TrackingConfig,
    run: Path,
    *,
    run_config: dict[str, Any],
    run_id: str | None = None,
    metrics_bytes: int | None = None,
    online: bool = False,
) -> Tracker:
    """The tracker of a training run, first opened or continued: always the same project, name, group and tags.

    `tracking` of another command than the one that trains (an evaluation) says how to track and what to add. Without a
    tracking.group, runs of one corpus and model size share a group in W&B, whose dashboard has filters for the rest, and
    runs of one variant in trackio.
    """
    corpus, variant = corpus_name(config.dataset), config.attention["name"]
    return open_tracker(
        _with_the_runs_own(tracking, config.tracking),
        run_dir=run,
        name=config.name,
        run_config=run_config,
        group=variant if tracking.name == "trackio" else f"{corpus}-{config.model.name}",
        job_type="train",
        tags=[variant, config.dataset.name, config.model.name],
        run_id=run_id,
        metrics_bytes=metrics_bytes,
        online=online,
    )


def _with_the_runs_own(tracking: TrackingConfig, own: TrackingConfig) -> TrackingConfig:
    """`tracking` where it says something, and what the run was trained with where it leaves its defaults."""
    return dataclasses.replace(
        tracking,
        project=own.project if tracking.project == TrackingConfig.project else tracking.project,
        entity=tracking.entity or own.entity,
        group=tracking.group or own.group,
        notes=tracking.notes or own.notes,
        tags=[*own.tags, *tracking.tags],
    )
