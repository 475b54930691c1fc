"""The report of a study, made again from its folder: python scripts/report.py study=NAME [key=value ...].

study      demo                  a YAML of configs/study
name       null                  of the study's folder below runs_dir; null: the study's
runs_dir   runs                  the study's runs lie in <runs_dir>/<name>, and so will report.html, .md, .csv, .json, figures/
tracking   none                  wandb or trackio: also one run of that dashboard with the table, the figures and the page

A study that is not finished is reported as far as it is; what is missing stands at the top. Nothing is trained or evaluated.
"""

# ruff: noqa: E402
from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.bootstrap import ROOT, enter_environment

enter_environment()

import json

from harness.command_line import parse_options, run_script
from harness.config import TRACKING, did_you_mean, user_path
from harness.errors import UserError
from harness.schema import TrackingConfig


@dataclass
class ReportOptions:
    study: str = "demo"
    name: str | None = None
    runs_dir: str = str(ROOT / "runs")
    tracking: str = "none"


def main(arguments: list[str]) -> int:
    options = parse_options(ReportOptions, arguments)
    if options.tracking not in TRACKING:
        raise UserError(f"tracking={options.tracking} is unknown; {did_you_mean(options.tracking, TRACKING)}")
    folder = user_path(options.runs_dir) / (options.name or options.study)

    from harness.study.publish import report_study
    from harness.tracking import check_tracking

    tracking = TrackingConfig(name=options.tracking)
    check_tracking(tracking)
    results, files = report_study(folder, tracking)
    print(json.dumps({"study": results.name, "folder": str(folder), "runs": len(results.runs), "missing": results.missing,
                      "files": [str(file) for file in files]}))  # fmt: skip
    return 0


if __name__ == "__main__":
    run_script(main, description=__doc__)
