"""A study's report: report.html, .md, .csv, .json and figures/*.png in its folder, and a run of the tracker's dashboard."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from harness.config.schema import TrackingConfig
from harness.evaluation.metric import BITS_PER_BYTE, METRICS
from harness.files.atomic import write_json, write_text, written_together
from harness.files.folders import refuse_links
from harness.files.text import at_tokens
from harness.report.findings import Findings, Verdict
from harness.report.page import page
from harness.report.plots import save_png
from harness.report.sections import sections
from harness.report.tables import study_csv, study_markdown
from harness.study.results import StudyResults, load_results
from harness.tracking import log_study

COLUMNS = ("arm", "seed", "learning rate", "parameters", "training FLOPs per token")


def report_study(folder: Path, tracking: TrackingConfig) -> tuple[StudyResults, list[Path]]:
    """Write the report of what a study's folder holds, publish it and say where it is; the results and the files.

    Raises UserError as `load_results` and `write_report` do.
    """
    results = load_results(folder)
    files = write_report(results, folder)
    publish(results, folder, tracking)
    print(f"report: {folder / 'report.html'}")
    return results, files


def write_report(results: StudyResults, folder: Path) -> list[Path]:
    """Write all files of the report and return their paths; figures of an earlier report are removed.

    Raises UserError when no run has finished yet, or when the folder cannot be written.
    """
    refuse_links(folder, ["figures"])
    findings = Findings(results)
    parts = sections(findings)
    pictures = {f"figures/{picture.name}.png": picture for section in parts for picture in section.pictures}
    texts = {
        "report.html": page(findings, parts),
        "report.md": study_markdown(findings, parts),
        "report.csv": study_csv(results),
    }
    with written_together(
        folder,
        record="report.json",
        stale=["figures/*.png"],
        what=f"the report in {folder}",
        remedy="make the folder writable, make room, or copy it to one that is",
    ) as temporary:
        for name, picture in pictures.items():
            save_png(picture, temporary / name)
        for name, text in texts.items():
            write_text(temporary / name, text)
        write_json(temporary / "report.json", as_dict(findings) | {"figures": list(pictures)})
    return [folder / name for name in (*texts, "report.json", *pictures)]


def as_dict(findings: Findings) -> dict[str, Any]:
    """The verdicts and the figures they rest on, for machines."""
    results, shared = findings.results, findings.shared
    content = {
        "study": results.record["name"],
        "question": results.record["question"],
        "command": results.record["command"],
        "metric": results.metric.name,
        "higher_is_better": results.metric.higher_is_better,
        "split": "test",
        "missing": results.missing,
        "failures": results.record["failures"],
        "notes": findings.notes,
        "sigma": findings.sigma,
        "degrees_of_freedom": findings.dof,
        "equal_variances_p": findings.unequal,
        "lineages": findings.lineages,
        "added": findings.added,
        "verdicts": [_verdict(verdict) for verdict in findings.verdicts],
        "best": findings.best,
        "arms": {
            arm.name: {
                "family": arm.info["family"],
                "level": arm.info["level"],
                "reference": arm.info["reference"],
                "seeds": [run.seed for run in arm.runs],
                "learning_rates": sorted({run.lr for run in arm.runs}),
                "mean": arm.mean,
                "parameters": arm.summary("parameters"),
                "cache_bytes_per_token": arm.summary("cache_bytes_per_token"),
                **{name: arm.test(metric) for name, metric in METRICS.items()},
            }
            for arm in findings.arms
        },
        "front": findings.front,
        "staircase": [{"arm": arm, "step": verdict and _verdict(verdict)} for arm, verdict in findings.staircase],
        "sweeps": [vars(each) | {"losses": {f"{lr:g}": loss for lr, loss in each.losses.items()}} for each in findings.sweeps],
        "trends": [vars(trend) | {"sentence": said, "exploratory": reason} for trend, said, reason in findings.trends],
        "shared_rate": shared and {"learning_rate": shared.lr, "means": shared.means, "contrasts": shared.verdicts},
        "unequal": [fact.name for fact in findings.facts if not fact.equal],
    }
    return {key: _plain(value) for key, value in content.items()}


def _verdict(verdict: Verdict) -> dict[str, Any]:
    noise = verdict.noise and vars(verdict.noise) | {"seeds": verdict.noise_seeds, "over": verdict.noise_units}
    more = {"sentence": verdict.sentence, "exploratory": verdict.exploratory, "also": verdict.also, "evaluation_noise": noise}
    return vars(verdict.contrast) | more


def _plain(value: Any) -> Any:
    """As JSON has it: a dataclass, wherever it stands, by its fields."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def tracked_table(results: StudyResults) -> tuple[list[str], list[list[Any]]]:
    """The columns and a row for each evaluated run; of the metrics those that every one of them has."""
    scored = [(run, record) for run in results.runs if (record := run.evaluation()) is not None]
    metrics = [metric for metric in METRICS.values() if all(metric.of(record) is not None for _, record in scored)]
    rows: list[list[Any]] = []
    for run, record in scored:
        sizes = run.summary["parameters"], run.summary["training_flops_per_token"], record["cache_bytes_per_token"]
        rows.append([run.arm, run.seed, run.lr, *sizes, *(metric.of(record) for metric in metrics)])
    at = at_tokens([record.get("cache_context") for _, record in scored])
    return [*COLUMNS, f"cache bytes per token{at}", *(metric.unit for metric in metrics)], rows


def publish(results: StudyResults, folder: Path, tracking: TrackingConfig) -> None:
    """Log what write_report has written to the folder. Does nothing for tracking=none."""
    columns, rows = tracked_table(results)
    unit = results.metric.unit if results.metric.unit in columns else BITS_PER_BYTE.unit
    log_study(
        tracking,
        study=results.record["name"],
        folder=folder,
        columns=columns,
        rows=rows,
        images={path.stem: path for path in sorted((folder / "figures").glob("*.png"))},
        html=folder / "report.html",
        scatter=(columns[len(COLUMNS)], unit),
    )
