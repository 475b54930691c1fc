"""The report of a study, made again from its folder: python scripts/report.py study=NAME [key=value ...].

A study that is not finished is reported as far as it is; what is missing stands at the top. Nothing is trained or evaluated.
With csv=FILE the verdicts are printed from a report.csv alone, such as those of docs/studies, whose runs are elsewhere.
"""

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
from harness.errors import UserError, writable


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
    csv: Annotated[str | None, "the report.csv of this study: print what its runs say, and write no report"] = None
    pairs: Annotated[str | None, "with csv: arms to compare besides, a:b,c:d for a minus b and c minus d"] = None
    picture: Annotated[str | None, "with csv: a PNG of quality against cache, to be written"] = None
    arms: Annotated[str | None, "with picture: the arms that it shows, a,b,c; null: all"] = None
    trends: Annotated[str | None, "with csv: a PNG of the study's trends, to be written"] = None


def main(arguments: list[str]) -> int:
    options = parse_options(ReportOptions, arguments)
    folder = user_path(options.runs_dir) / (options.name or options.study)

    if options.csv is not None:
        from harness.report.plots import save_png
        from harness.report.verdicts_from_csv import restated

        if options.arms is not None and options.picture is None:
            raise UserError("arms=... is for picture=FILE")
        shown = options.arms.split(",") if options.arms else []
        told, by_cache, trends = restated(user_path(options.csv), options.study, _pairs(options.pairs), shown)
        print(told)
        for name, file, picture in (("picture", options.picture, by_cache), ("trends", options.trends, trends)):
            if file is None:
                continue
            if picture is None:
                raise UserError(f"{name}={file}: study={options.study} has no {name}: name one whose YAML has some")
            with writable(f"{name}={file}", "name a file in a folder that takes it"):
                save_png(picture, user_path(file))
        return 0
    for name in ("pairs", "picture", "arms", "trends"):
        if getattr(options, name) is not None:
            raise UserError(f"{name}=... is for csv=FILE: a study's own stand in its YAML and in its report")

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


def _pairs(text: str | None) -> list[tuple[str, str]]:
    pairs = [tuple(pair.split(":")) for pair in text.split(",")] if text else []
    if any(len(pair) != 2 for pair in pairs):
        raise UserError(f"pairs={text} must name two arms each, as in pairs=mla:gqa,mla:mqa")
    return [(a, b) for a, b in pairs]


if __name__ == "__main__":
    run_script(main, description=__doc__, options=ReportOptions, groups=("study",))
