"""Compare finished runs: one table, seeds folded, and a picture of bits per byte against cache bytes per token.

python scripts/compare_runs.py                          every finished run
python scripts/compare_runs.py runs/A runs/B runs/C     these, by folder or name
python scripts/compare_runs.py caches=all               also through quantised and windowed caches, if so evaluated
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.entry.bootstrap import enter_environment

enter_environment()

import json

from harness.config.places import ROOT, user_path
from harness.config.schema import Split, Tracker, TrackingConfig
from harness.entry.cli import chosen_folders, parse_options, run_script


@dataclass
class CompareOptions:
    runs: Annotated[list[str], "which runs, written without runs=; none: every finished one"] = field(default_factory=list)
    runs_dir: Annotated[str, "where runs are looked for"] = str(ROOT / "runs")
    out: Annotated[str | None, "gets comparison.md, .csv, .json and .png; null: artifacts/comparison"] = None
    split: Annotated[
        Split | None,
        "test, validation or train; null: test where a run was evaluated on it, else validation. Runs that lack the "
        "evaluation of the others are listed and stand in no table",
    ] = None
    dataset: Annotated[str | None, "the corpus of the evaluations; null: the one each run was trained on"] = None
    evaluation: Annotated[
        str | None,
        "one evaluation by its name, a file of evaluations/ without .json, or by an option that it was made with "
        "(max_tokens=8000): the way to compare on a part of a split, which is never taken otherwise",
    ] = None
    caches: Annotated[
        Literal["plain", "all"],
        "plain; all: every evaluation of a run that differs from the plain one only in its cache becomes a row (python "
        "eval_model.py run=all cache.dtype=int8, or cache.window=64 cache.sinks=4), and sizes are cache bytes per token of "
        "the context",
    ] = "plain"
    strict: Annotated[bool, "true: refuse runs that cannot stand in one table, instead of making several"] = False
    tracking: Annotated[Tracker, "wandb; trackio: a dashboard on this machine; none: nothing is sent or shown"] = "wandb"


def main(arguments: list[str]) -> int:
    options = parse_options(CompareOptions, arguments, positional="runs")
    folders = chosen_folders(options.runs, options.runs_dir)
    out = user_path(options.out) if options.out is not None else ROOT / "artifacts" / "comparison"

    from harness.evaluation.metric import SCORES
    from harness.files.atomic import written_together
    from harness.report.comparison import as_text, compare, plain_table, scatter_points, write_tables
    from harness.report.comparison_picture import scatter
    from harness.report.plots import save_png
    from harness.tracking import Dashboard, Table, check_tracking, open_tracker

    check_tracking(TrackingConfig(name=options.tracking))
    comparison = compare(
        folders or [user_path(options.runs_dir)],
        split=options.split,
        dataset=options.dataset,
        evaluation=options.evaluation,
        every_cache=options.caches == "all",
        strict=options.strict,
    )
    print(as_text(comparison))
    picture = out / "comparison.png"
    with written_together(
        out, record="comparison.json", what=f"out={out}", remedy="choose another folder with out=..., or make room"
    ) as temporary:
        names = [path.name for path in write_tables(comparison, temporary)]
        save_png(scatter(comparison), temporary / picture.name)
    files = [*(out / name for name in names), picture]
    print(f"written: {', '.join(str(path) for path in files)}", flush=True)

    runs = [run for table in comparison.tables for setup in table.setups for run in setup.runs]
    with open_tracker(
        TrackingConfig(name=options.tracking),
        run_dir=out,
        name="comparison",
        run_config={"runs": runs},
        group="comparison",
        job_type="compare",
        tags=[],
    ) as tracker:

        def show(dashboard: Dashboard) -> None:
            dashboard.table("comparison", Table(*plain_table(comparison)))
            for number, table in enumerate(comparison.tables, start=1):
                key = "scatter" if number == 1 else f"scatter_{number}"
                for figure in SCORES:
                    points = Table(*scatter_points(table, figure))
                    title = table.heading or f"{figure} against cache bytes per token"
                    dashboard.scatter(f"{key}/{figure}", points, x=points.columns[1], y=figure, title=title)
            dashboard.image("bits_per_byte_against_cache", picture, caption="; ".join(comparison.notes))

        tracker.mirror(show)
    print(json.dumps({"runs": len(runs), "record": str(out / "comparison.json")}))
    return 0


if __name__ == "__main__":
    run_script(main, description=__doc__, options=CompareOptions)
