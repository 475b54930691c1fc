"""Bring runs into trackio, a dashboard on this machine, however they were tracked when they were trained.

python scripts/show_runs.py                             every run below runs/
python scripts/show_runs.py runs/A runs/B               these, by folder or name
python scripts/show_runs.py runs_dir=runs/STUDY         a study's runs

Done again, it takes what has been logged since; every run stands there once. Needs pip install -r requirements-extra.txt.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.entry.bootstrap import enter_environment

enter_environment()

import json

from harness.config.places import ROOT, user_path
from harness.config.run_config import find_run, is_run, run_folders
from harness.config.schema import TrackingConfig
from harness.entry.cli import parse_options, run_script
from harness.errors import UserError
from harness.tracking import check_tracking


@dataclass
class ShowOptions:
    runs: Annotated[list[str], "which runs, written without runs=; none: all"] = field(default_factory=list)
    runs_dir: Annotated[str, "where runs are looked for"] = str(ROOT / "runs")
    project: Annotated[str, "the dashboard's project; a run that was trained with another one goes to that"] = (
        TrackingConfig.project
    )
    group: Annotated[str | None, "what the runs are grouped by; null: what each was trained with, else its variant"] = None


def main(arguments: list[str]) -> int:
    options = parse_options(ShowOptions, arguments, positional="runs")
    tracking = TrackingConfig(name="trackio", project=options.project, group=options.group)
    check_tracking(tracking)
    runs_dir = user_path(options.runs_dir)
    found = [path for path in run_folders(runs_dir) if is_run(path)]
    runs = [find_run(text, runs_dir) for text in options.runs] or found
    if not runs:
        raise UserError(f"runs_dir={options.runs_dir} holds no run; train one with python train_model.py")

    from harness.runs.to_dashboard import mirror

    for run in runs:
        mirror(run, tracking)
    print(json.dumps({"runs": [str(run) for run in runs]}))
    return 0


if __name__ == "__main__":
    run_script(main, description=__doc__, options=ShowOptions)
