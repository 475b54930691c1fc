"""Compare finished runs: one table, seeds folded, and a picture of bits per byte against cache bytes per token.

python scripts/compare_runs.py                          every finished run
python scripts/compare_runs.py runs/A runs/B runs/C     these, by folder or name
python scripts/compare_runs.py caches=all               also through quantised and windowed caches, if so evaluated

runs_dir  runs                  where runs are looked for
out       artifacts/comparison  gets comparison.md, .csv, .json and .png
split     null                  test, validation or train; null: test if every run was evaluated on it, else validation
dataset   null                  the corpus of the evaluations; null: the one each run was trained on
caches    plain                 all: every evaluation of a run that differs from the plain one only in its cache becomes a
                                row (python eval_model.py run=all cache.dtype=int8, or cache.window=64 cache.sinks=4),
                                and sizes are cache bytes per token of the context
strict    false                 true: refuse runs that cannot stand in one table, instead of making several
tracking  wandb                 trackio: a dashboard on this machine; none: nothing goes to Weights & Biases
"""

# ruff: noqa: E402
from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.bootstrap import enter_environment

enter_environment()

import json

from harness.command_line import parse_options, run_script
from harness.config import ROOT, TRACKING, did_you_mean, find_run, user_path
from harness.errors import UserError
from harness.schema import TrackingConfig


@dataclass
class CompareOptions:
    runs: list[str] = field(default_factory=list)
    runs_dir: str = str(ROOT / "runs")
    out: str | None = None
    split: str | None = None
    dataset: str | None = None
    caches: str = "plain"
    strict: bool = False
    tracking: str = "wandb"


def main(arguments: list[str]) -> int:
    options = parse_options(CompareOptions, arguments, positional="runs")
    for key, value, choices in (
        ("tracking", options.tracking, TRACKING),
        ("caches", options.caches, ("plain", "all")),
        ("split", options.split or "test", ("train", "validation", "test")),
    ):
        if value not in choices:
            raise UserError(f"{key}={value} is unknown; {did_you_mean(value, choices)}")
    runs_dir = user_path(options.runs_dir)
    folders = [path if (path := user_path(text)).is_dir() else find_run(text, runs_dir) for text in options.runs]
    out = user_path(options.out) if options.out is not None else ROOT / "artifacts" / "comparison"

    from harness.comparison import as_text, compare, plain_table, write_tables
    from harness.comparison_plot import save_scatter
    from harness.tracking import check_tracking, open_tracker

    check_tracking(TrackingConfig(name=options.tracking))
    comparison = compare(
        folders or [runs_dir], split=options.split, dataset=options.dataset, every_cache=options.caches == "all",
        strict=options.strict,
    )  # fmt: skip
    print(as_text(comparison))
    picture = out / "comparison.png"
    try:
        files = [*write_tables(comparison, out), picture]
        save_scatter(comparison, picture)
    except OSError as error:
        raise UserError(f"out={out} cannot be written ({error.strerror}): choose another folder with out=...") from None
    print(f"written: {', '.join(str(path) for path in files)}", flush=True)

    runs = [run for table in comparison.tables for setup in table.setups for run in setup.runs]
    with open_tracker(
        TrackingConfig(name=options.tracking), run_dir=out, name="comparison", run_config={"runs": runs},
        group="comparison", job_type="compare", tags=[], run_id=None, metrics_bytes=None,
    ) as tracker:  # fmt: skip
        tracker.log_table("comparison", *plain_table(comparison))
        tracker.log_image("bits_per_byte_against_cache", picture, caption="; ".join(comparison.notes))
    print(json.dumps(comparison.as_dict() | {"files": [str(path) for path in files]}))
    return 0


if __name__ == "__main__":
    run_script(main, description=__doc__)
