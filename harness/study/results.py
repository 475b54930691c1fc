"""What a study has reached so far: its record, its finished runs and their evaluations, read from its folder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness.errors import UserError
from harness.evaluation.metric import METRICS, Metric
from harness.files.metrics import read_metrics
from harness.runs.evaluations import by_preference, judges
from harness.runs.folder import finished
from harness.runs.records import (
    DecodeRow,
    Evaluation,
    RunSummary,
    SegmentRecord,
    SpecRecord,
    StudyRecord,
    read_config,
    read_decode_times,
    read_evaluations,
    read_segments,
    read_study,
    read_summary,
)
from harness.study.statistics import origins

# What a report takes from the summary of every run, and as it stands into its CSV.
SIZES = ("parameters", "training_flops_per_token", "cache_bytes_per_token", "cache_ratio_to_mha", "tokens")
CIRCUMSTANCES = ("tokens_per_second", "seconds", "kernel", "precision", "device", "torch", "commit")
IDENTITY = ("setup_hash", "data_fingerprint")
LENGTH = 32_768  # of CACHE_CONTEXTS: where caches that are no straight line are compared once more
AT_LENGTH = f"cache_bytes_at_{LENGTH}"  # their column there
_ORIGIN = ("name", "dataset", "seed", "data_seed", "tokenizer_fingerprint")
_FIGURES = ("loss", "bits_per_byte", "parameters_by_block", "cache_dtype", "compiled")


@dataclass(frozen=True)
class RunResult:
    """One finished run of a study."""

    arm: str
    seed: int
    lr: float
    folder: Path
    config: dict[str, Any]  # config.yaml, nested plain containers
    summary: RunSummary
    evaluations: list[Evaluation]  # of a split and corpus last the one that stands for the run; "record": its file
    metrics: list[dict[str, Any]]  # lines of metrics.jsonl

    def evaluation(self) -> Evaluation | None:
        """The one without a cache on the test split of the run's own corpus; None if there is none.

        Of several the one that harness/runs/evaluations.py chooses for the whole study.
        """
        found = [record for record in self.evaluations if judges(record, self.summary["dataset"])]
        return found[-1] if found else None

    def segments(self) -> SegmentRecord | None:
        """nats and bytes of each segment of that evaluation, for the bootstrap."""
        record = self.evaluation()
        return None if record is None else read_segments(self.folder, record["record"])


@dataclass(frozen=True)
class StudyResults:
    """All that a report is made of."""

    folder: Path
    record: StudyRecord
    runs: list[RunResult]  # finished main runs
    sweep: list[RunResult]  # finished runs of the learning-rate sweep
    decode: list[DecodeRow] | None

    @property
    def metric(self) -> Metric:
        return METRICS[self.record["metric"]]

    @property
    def missing(self) -> int:
        """Main runs that are not finished."""
        return len(self.record["runs"]) - len(self.runs)

    def value(self, run: RunResult) -> float | None:
        """The metric of a run's test evaluation; None where it was not evaluated, or its record lacks the figure."""
        return self.metric.of(run.evaluation())

    def values(self, metric: Metric | None = None) -> dict[str, dict[int, float]]:
        """arm -> seed -> the study's metric, or another one, of the arms and seeds that have it."""
        values: dict[str, dict[int, float]] = {}
        for run in self.runs:
            value = (metric or self.metric).of(run.evaluation())
            if value is not None:
                values.setdefault(run.arm, {})[run.seed] = value
        return values

    def lineages(self) -> dict[str, str]:
        """arm -> the arm whose runs its own descend from, converted or trained on; of arms that descend from others."""
        arms = {spec["name"]: spec["arm"] for spec in self.record["runs"]}
        found: dict[str, str] = {}
        for run, first in origins({spec["name"]: spec.get("source") for spec in self.record["runs"]}).items():
            found.setdefault(arms[run], arms.get(first, first))
        return found


def bytes_at_length(summary: RunSummary) -> int | None:
    """Of a cache of LENGTH tokens; None in a record from before sizes were a curve."""
    return (summary.get("cache_bytes_by_context") or {}).get(str(LENGTH))


def load_results(folder: Path) -> StudyResults:
    """Read a study's folder. Raises UserError when it is none, or a file in it is damaged."""
    record = read_study(folder)
    runs = _scored_alike([_read_run(folder, spec) for spec in record["runs"] if finished(folder / spec["name"])])
    sweep = [_read_run(folder, spec) for spec in record["sweep"] if finished(folder / spec["name"])]
    timed = read_decode_times(folder)
    return StudyResults(folder, record, runs, sweep, None if timed is None else timed["rows"])


def _scored_alike(runs: list[RunResult]) -> list[RunResult]:
    """The runs, the evaluations of each in the order that the field of that name has."""
    ordered: list[list[Evaluation]] = [[] for _ in runs]
    for place in sorted({(record["dataset"], record["split"]) for run in runs for record in run.evaluations}):
        pools = [[record for record in run.evaluations if (record["dataset"], record["split"]) == place] for run in runs]
        for order, pool in zip(ordered, by_preference(pools), strict=True):
            order += pool
    return [replace(run, evaluations=order) for run, order in zip(runs, ordered, strict=True)]


def _read_run(folder: Path, spec: SpecRecord) -> RunResult:
    run = folder / spec["name"]
    summary = read_summary(run, *_ORIGIN, *_FIGURES, *SIZES, *CIRCUMSTANCES, *IDENTITY)
    if summary["seed"] != spec["seed"]:
        raise UserError(
            f"{run} is a run of seed {summary['seed']}, in this study's record of seed {spec['seed']}: move it away, and run "
            f"the study again"
        )
    return RunResult(
        arm=spec["arm"],
        seed=spec["seed"],
        lr=spec["lr"],
        folder=run,
        config=read_config(run),
        summary=summary,
        metrics=read_metrics(run),
        evaluations=read_evaluations(run),
    )
