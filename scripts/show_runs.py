"""Bring runs into trackio, a dashboard on this machine, however they were tracked when they were trained.

python scripts/show_runs.py                             every run below runs/
python scripts/show_runs.py runs/A runs/B               these, by folder or name
python scripts/show_runs.py runs_dir=runs/STUDY         a study's runs

Done again, it takes what has been logged since; every run stands there once. Needs pip install -r requirements-extra.txt.

runs_dir  runs                  where runs are looked for
project   attention-ablation    the dashboard's project; a run that was trained with another one goes to that
group     null                  what the runs are grouped by; null: what each was trained with, else its variant
"""

# ruff: noqa: E402
from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.bootstrap import enter_environment

enter_environment()

import json

from harness.command_line import parse_options, run_script
from harness.config import ROOT, find_run, load_run_config, user_path
from harness.errors import UserError
from harness.run import finished, read_json
from harness.schema import TrackingConfig
from harness.tracking import check_tracking


@dataclass
class ShowOptions:
    runs: list[str] = field(default_factory=list)
    runs_dir: str = str(ROOT / "runs")
    project: str = TrackingConfig.project
    group: str | None = None


def main(arguments: list[str]) -> int:
    options = parse_options(ShowOptions, arguments, positional="runs")
    tracking = TrackingConfig(name="trackio", project=options.project, group=options.group)
    check_tracking(tracking)
    runs_dir = user_path(options.runs_dir)
    found = [path.parent for path in sorted(runs_dir.glob("[!.]*/config.yaml"))]
    runs = [find_run(text, runs_dir) for text in options.runs] or found
    if not runs:
        raise UserError(f"runs_dir={options.runs_dir} holds no run; train one with python train_model.py")

    from harness.score import dashboard_figures
    from harness.session import open_run_tracker

    for run in runs:
        config = load_run_config(run)
        with open_run_tracker(
            config, tracking, run, run_config=asdict(config), run_id=None, metrics_bytes=None
        ) as tracker:
            if finished(run):
                tracker.summary(read_json(run / "summary.json"))
            for record in sorted((run / "evaluations").glob("*.json")):
                tracker.summary(dashboard_figures(read_json(record)))
    print(json.dumps({"runs": [str(run) for run in runs]}))
    return 0


if __name__ == "__main__":
    run_script(main, description=__doc__)
