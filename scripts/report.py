"""The report of a study, made again from its folder: python scripts/report.py study=NAME [key=value ...].

A study that is not finished is reported as far as it is; what is missing stands at the top. Nothing is trained or evaluated.
"""

# ruff: noqa: E402
from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.entry.bootstrap import ROOT, enter_environment

enter_environment()

import json

from harness.config.places import user_path
from harness.config.schema import Tracker, TrackingConfig
from harness.entry.cli import parse_options, run_script


@dataclass
class ReportOptions:
    study: Annotated[str, "a YAML of configs/study"] = "demo"
    name: Annotated[str | None, "of the study's folder below runs_dir; null: the study's"] = None
    runs_dir: Annotated[
        str, "the study's runs lie in <runs_dir>/<name>, and so will report.html, .md, .csv, .json and figures/"
    ] = str(ROOT / "runs")
    tracking: Annotated[
        Tracker, "wandb or trackio: also one run of that dashboard with the table, the figures and the page"
    ] = "none"


def main(arguments: list[str]) -> int:
    options = parse_options(ReportOptions, arguments)
    folder = user_path(options.runs_dir) / (options.name or options.study)

    from harness.report.write import report_study
    from harness.tracking import check_tracking

    tracking = TrackingConfig(name=options.tracking)
    check_tracking(tracking)
    results, files = report_study(folder, tracking)
    line = {
        "study": results.record["name"],
        "folder": str(folder),
        "record": str(folder / "report.json"),
        "report": str(files[0]),
    }
    print(json.dumps(line | {"runs": len(results.runs), "missing": results.missing}))
    return 0


if __name__ == "__main__":
    run_script(main, description=__doc__, options=ReportOptions, groups=("study",))
