"""What was declared of a study before its first result, and what after it, from the history that study.json keeps.

A command that starts writes down the arms, their seeds and learning rates, the contrasts, the metric and the margin that it was
given, wherever they differ from what stands there, with the number of runs that had finished by then. What was added or chosen
again once there was something to look at is exploratory, whoever says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

from harness.runs.provenance import now
from harness.runs.records import DeclarationRecord, StudyRecord

_DECLARED = ("arms", "contrasts", "margin", "trends", "metric", "rates")


def extended(
    before: StudyRecord | None,
    *,
    arms: Mapping[str, Sequence[int]],
    contrasts: Sequence[tuple[str, str]],
    margin: float | None,
    metric: str,
    results: int,
    rates: Mapping[str, float | None],
    trends: Sequence[str] = (),
) -> list[DeclarationRecord]:
    """The history with what a command declares now.

    before: the record that is there; one from before there was a history, or none beside finished runs, leaves open when its
    content was declared. arms: their seeds. rates: of each arm's runs; None: a sweep of it shall say. results: runs that have
    finished, those too that the study no longer names.
    """
    history = [] if before is None else [*before.get("history", ())]
    if before is not None and not history:
        seeds = {arm: sorted({run["seed"] for run in before["runs"] if run["arm"] == arm}) for arm in before["arms"]}
        history.append({"at": None, "results": None, "arms": seeds, "contrasts": before["contrasts"], "margin": None})
    declared: DeclarationRecord = {
        "at": now(),
        # A record that names other runs now, or whose runs were deleted, does not undo what was seen.
        "results": None if before is None and results else max([results, *(entry["results"] or 0 for entry in history)]),
        "arms": {arm: sorted(seeds) for arm, seeds in arms.items()},
        "contrasts": [*contrasts],
        "margin": margin,
        "trends": [*trends],
        "metric": metric,
        "rates": {**rates},
    }
    unsaid = {} if before is None else {"trends": [], "metric": before["metric"], "rates": _rates(before)}  # in older entries
    last = unsaid | history[-1] if history else {}
    if all(last.get(key) == declared[key] for key in _DECLARED):  # type: ignore[literal-required]
        return history
    return [*(cast(DeclarationRecord, unsaid | entry) for entry in history), declared]


@dataclass(frozen=True)
class Additions:
    """What a study has that was not declared before its first result, as far as that is known."""

    known: bool = False  # when everything was declared
    arms: list[str] = field(default_factory=list)
    seeds: dict[str, list[int]] = field(default_factory=dict)  # of arms that were there
    contrasts: list[tuple[str, str]] = field(default_factory=list)
    margin: bool = False
    metric: bool = False
    rates: list[str] = field(default_factory=list)  # arms whose runs are at another one than was declared
    trends: list[str] = field(default_factory=list)
    dropped: list[tuple[str, str]] = field(default_factory=list)  # declared first, and no longer there
    dropped_trends: list[str] = field(default_factory=list)

    def reason(self, a: str, b: str) -> str | None:
        """Why the comparison of two arms is exploratory; None if it is not."""
        return "the comparison was added after the first result" if (a, b) in self.contrasts else self.late(a, b)

    def late(self, a: str, b: str) -> str | None:
        """What of two arms, or of what they are judged by, was added after the first result, in words."""
        if self.metric:
            return "the metric was chosen after the first result"
        if late := [arm for arm in (a, b) if arm in self.arms]:
            return f"{' and '.join(late)} {'was' if len(late) == 1 else 'were'} added after the first result"
        if late := [arm for arm in (a, b) if arm in self.rates]:
            return f"the learning rate of {' and '.join(late)} was changed after the first result"
        late = [f"seeds {', '.join(map(str, self.seeds[arm]))} of {arm}" for arm in (a, b) if arm in self.seeds]
        return f"{' and '.join(late)} were added after the first result" if late else None


def _rates(record: StudyRecord) -> dict[str, float]:
    """Of the runs of each arm."""
    return {run["arm"]: run["lr"] for run in record["runs"]}


def _another_rate(record: StudyRecord, arm: str) -> bool:
    """Whether an arm's runs are at another rate than was declared before the first result, or than the declared sweep found."""
    history = [entry for entry in record["history"] if arm in entry.get("rates", {})]
    early, later = ([entry["rates"][arm] for entry in history if bool(entry["results"]) is late] for late in (False, True))
    found = [lr for lr in (*early[-1:], *later) if lr is not None]
    if not early or not found:
        return False
    return found[0] != _rates(record)[arm] or (early[-1] is None and arm not in record["chosen_lr"])


def additions(record: StudyRecord) -> Additions:
    """What stands in a study's record against its history."""
    history = record.get("history", [])
    early = [entry for entry in history if not entry["results"]]
    if not history:
        return Additions()
    seeds = {
        arm: {run["seed"] for run in record["runs"] if run["arm"] == arm}
        - {seed for entry in early for seed in entry["arms"].get(arm, ())}
        for arm in record["arms"]
    }
    arms = [arm for arm in record["arms"] if not any(arm in entry["arms"] for entry in early)]
    first = [pair for entry in early for pair in entry["contrasts"]]
    first_trends = dict.fromkeys(name for entry in early for name in entry.get("trends", ()))
    return Additions(
        known=all(entry["results"] is not None for entry in early),
        arms=arms,
        seeds={arm: sorted(late) for arm, late in seeds.items() if late and arm not in arms},
        contrasts=[pair for pair in record["contrasts"] if pair not in first],
        trends=[name for name in record.get("trends", {}) if name not in first_trends],
        margin=record.get("margin") is not None and all(entry["margin"] != record.get("margin") for entry in early),
        metric=bool(early) and all(entry.get("metric", record["metric"]) != record["metric"] for entry in early),
        rates=[arm for arm in _rates(record) if _another_rate(record, arm)],
        dropped=[pair for pair in dict.fromkeys(first) if pair not in record["contrasts"]],
        dropped_trends=[name for name in first_trends if name not in record.get("trends", {})],
    )
