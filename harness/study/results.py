"""What a study has reached so far: its record, its finished runs and their evaluations, read from its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import UserError
from harness.run import finished, read_json

STUDY_FILE = "study.json"  # the record in a study's folder, written by plan.py


@dataclass(frozen=True)
class RunResult:
    """One finished run of a study."""

    arm: str
    seed: int
    lr: float
    folder: Path
    config: dict[str, Any]  # config.yaml, nested plain containers
    summary: dict[str, Any]
    evaluations: list[dict[str, Any]]  # oldest first; "record" is each one's file, without its ending
    metrics: list[dict[str, Any]]  # lines of metrics.jsonl

    def evaluation(self, split: str = "test", dataset: str | None = None) -> dict[str, Any] | None:
        """The newest one without a cache on that split, of the named corpus or of the run's own; None if there is none."""
        found = [
            record for record in self.evaluations
            if record["split"] == split and not record.get("through_cache")
            and record["dataset"] == (dataset or self.summary["dataset"])
        ]  # fmt: skip
        return found[-1] if found else None

    def segments(self, split: str = "test") -> dict[str, list[Any]] | None:
        """tokens, nats and bytes of each segment of the split's newest plain evaluation, for the bootstrap."""
        record = self.evaluation(split)
        path = None if record is None else self.folder / "segments" / f"{record['record']}.json"
        return read_json(path) if path is not None and path.is_file() else None


@dataclass(frozen=True)
class ArmInfo:
    """An arm as it is reported."""

    name: str
    family: str
    overrides: list[str]
    level: str | None
    reference: bool
    match: list[dict[str, Any]]  # harness/study/matching.py: Matched
    converted: bool = False  # from another arm's weights, without training


@dataclass(frozen=True)
class StudyResults:
    """All that a report is made of."""

    name: str
    question: str
    folder: Path
    command: str
    metric: str
    arms: list[ArmInfo]
    contrasts: list[tuple[str, str]]  # declared beforehand
    staircase: list[str] | None
    runs: list[RunResult]  # finished main runs
    sweep: list[RunResult]  # finished runs of the learning-rate sweep
    chosen_lr: dict[str, float]
    shared_lr: float | None
    failures: list[dict[str, str]]  # run, error
    missing: int  # main runs that are not finished
    decode: list[dict[str, Any]] | None  # arm, context, batch, milliseconds, low, high, device, path

    def values(self, metric: str | None = None, split: str = "test") -> dict[str, dict[int, float]]:
        """arm -> seed -> a figure of the split's evaluation, of the arms and seeds that have one."""
        values: dict[str, dict[int, float]] = {}
        for run in self.runs:
            record = run.evaluation(split)
            if record is not None:
                values.setdefault(run.arm, {})[run.seed] = float(record[metric or self.metric])
        return values


def load_results(folder: Path) -> StudyResults:
    """Read a study's folder. Raises UserError when it is none, or a file in it is damaged."""
    path = folder / STUDY_FILE
    if not path.is_file():
        raise UserError(
            f"{folder} holds no study.json, so it is no study: run one with python scripts/run_study.py study=..."
        )
    record = read_json(path)
    try:
        return _results(folder, record)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"{path} is not what run_study.py writes ({type(error).__name__}: {error}): restore it, or run the study again"
        ) from None


def _results(folder: Path, record: Mapping[str, Any]) -> StudyResults:
    runs = [_read_run(folder / spec["name"], spec) for spec in record["runs"] if finished(folder / spec["name"])]
    sweep = [_read_run(folder / spec["name"], spec) for spec in record["sweep"] if finished(folder / spec["name"])]
    decode = folder / "decode.json"
    arms = [
        ArmInfo(
            name,
            arm["family"],
            arm["overrides"],
            arm["level"],
            arm["reference"],
            arm["match"],
            arm.get("converted", False),
        )
        for name, arm in record["arms"].items()
    ]
    return StudyResults(
        name=record["name"], question=record["question"], folder=folder, command=record["command"],
        metric=record["metric"], arms=arms,
        contrasts=[(a, b) for a, b in record["contrasts"]], staircase=record["staircase"] or None, runs=runs, sweep=sweep,
        chosen_lr=record["chosen_lr"], shared_lr=record["shared_lr"], failures=record["failures"],
        missing=len(record["runs"]) - len(runs), decode=read_json(decode)["rows"] if decode.is_file() else None,
    )  # fmt: skip


def _read_run(folder: Path, spec: Mapping[str, Any]) -> RunResult:
    import yaml

    evaluations = sorted(folder.glob("evaluations/*.json"), key=lambda path: path.stat().st_mtime)
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        metrics = [json.loads(line) for line in lines]
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"the run {folder} is damaged ({' '.join(str(error).split())}): delete it and run the study again") \
            from None  # fmt: skip
    return RunResult(
        arm=spec["arm"], seed=spec["seed"], lr=spec["lr"], folder=folder, config=config,
        summary=read_json(folder / "summary.json"), metrics=metrics,
        evaluations=[read_json(path) | {"record": path.stem} for path in evaluations],
    )  # fmt: skip
