"""A study's report, in its folder and in the tracker that its runs are in: one table, the plots, and the page itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness.schema import TrackingConfig
from harness.study.report import write_report
from harness.study.results import StudyResults, load_results
from harness.tracking import log_study

COLUMNS = ("arm", "seed", "learning rate", "parameters", "training FLOPs per token", "cache bytes per token",
           "bits per byte", "perplexity")  # fmt: skip


def rows_of(results: StudyResults) -> list[list[Any]]:
    """One row for each evaluated run, in COLUMNS."""
    rows = []
    for run in results.runs:
        record = run.evaluation()
        if record is not None:
            rows.append([run.arm, run.seed, run.lr, run.summary["parameters"], run.summary["training_flops_per_token"],
                         record["cache_bytes_per_token"], record["bits_per_byte"], record["perplexity"]])  # fmt: skip
    return rows


def publish(results: StudyResults, folder: Path, tracking: TrackingConfig) -> None:
    """Log what write_report has written to the folder. Does nothing for tracking=none."""
    page = folder / "report.html"
    log_study(
        tracking, study=results.name, folder=folder, columns=COLUMNS, rows=rows_of(results),
        images={path.stem: path for path in sorted((folder / "figures").glob("*.png"))},
        html=page if page.is_file() else None, scatter=("cache bytes per token", "bits per byte"),
    )  # fmt: skip


def report_study(folder: Path, tracking: TrackingConfig) -> tuple[StudyResults, list[Path]]:
    """Write the report of what a study's folder holds, publish it and say where it is; the results and the files.

    Raises UserError as `load_results` and `write_report` do.
    """
    results = load_results(folder)
    files = write_report(results, folder)
    publish(results, folder, tracking)
    print(f"report: {folder / 'report.html'}")
    return results, files
